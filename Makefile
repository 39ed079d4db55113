# Everything below needs Go and make. `make test` also needs a C compiler for
# the race detector; as root on Debian it installs what is missing.
BIN     := bin/connected-registry
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)"

.PHONY: build demo test e2e bench lint image

build:
	$(GOBUILD) -o $(BIN) ./cmd/connected-registry

demo:
	@go run ./test/demo

test:
	@./test/prepare gcc
	go vet ./...
	go test -race ./...
	go test -race -count=1 -C test/containerd ./...

e2e:
	go test -count=1 -v -C test/containerd ./...

bench:
	@./test/prepare nginx-light
	go run -C test/bench .

lint:
	go tool -modfile=tools/go.mod golangci-lint run ./...

image: build
	go run ./test/image -binary $(BIN) -o dist/connected-registry.tar
