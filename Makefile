# Everything below needs Go and make. `make test` also needs a C compiler for
# the race detector; as root on Debian it installs what is missing.
BIN     := bin/connected-registry
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)"

.PHONY: build demo test clients replicas objects e2e cluster cluster-down bench lint image manifests chart-deps

build:
	$(GOBUILD) -o $(BIN) ./cmd/connected-registry

demo:
	@go run ./test/demo

test:
	@./test/prepare gcc
	go vet ./...
	go test -race ./...
	go test -C test/containerd -race -count=1 ./...
	go test -C test/nodes -race -count=1 ./...
	go test -C test/chart -count=1 ./...

# The clients that people have, unchanged; as root, for podman's sake.
clients:
	@./test/prepare gcc skopeo podman crun
	go test -C test/clients -count=1 ./...

# Real object stores; the first run compiles MinIO, for some minutes.
objects: test/objects/azurite/node_modules
	go test -C test/objects -count=1 -parallel 8 -timeout 30m ./...

test/objects/azurite/node_modules: test/objects/azurite/package-lock.json
	@./test/prepare nodejs npm
	npm ci --prefix test/objects/azurite --ignore-scripts --no-audit --no-fund
	@touch $@

# Two replicas, one of which is killed again and again under load; as root, for
# containerd's sake. For longer: go test -C test/replicas . -replicas.time=10m;
# on an object store: -replicas.storage=FILE.
replicas:
	go test -C test/replicas -count=1 ./...

# What needs a real Kubernetes; the first run compiles one, for a quarter of an hour.
e2e:
	go run -C test/cluster ./cmd/cluster build
	go test -C test/cluster -race -count=1 -timeout 20m ./...
	go test -C test/controller -count=1 -timeout 15m ./...
	go test -C test/certificates -count=1 -timeout 20m ./...
	go test -C test/e2e -count=1 -timeout 40m ./...
	go test -C test/layouts -count=1 -timeout 20m ./...

# A cluster of two nodes with the product on it.
cluster:
	@go run -C test/cluster ./cmd/cluster up
	@go run -C test/e2e ./cmd/install

cluster-down:
	@go run -C test/cluster ./cmd/cluster down

bench:
	@./test/prepare nginx-light
	go run -C test/bench .
	go run -C test/trustbench .

lint:
	go tool -modfile=tools/go.mod golangci-lint run ./...

image: build
	go run ./test/image -binary $(BIN) -o dist/connected-registry.tar

# The CRD and the deep copies, from the Go types; the schema of the chart's
# values, from the CRD; the plain manifests, from the chart.
manifests:
	go tool -modfile=tools/controller-gen/go.mod controller-gen crd object paths=./api/... output:crd:dir=manifests output:object:dir=api/v1alpha1
	go run -C test/chart . manifests

# cert-manager's chart, which ours depends on, from its Go module.
chart-deps:
	go run -C test/chart . deps
