module github.com/connected-registry/connected-registry/test/layouts

go 1.26.6

replace (
	github.com/connected-registry/connected-registry/test/cluster => ../cluster
	github.com/connected-registry/connected-registry/test/e2e => ../e2e
)

require (
	github.com/connected-registry/connected-registry/test/cluster v0.0.0
	github.com/connected-registry/connected-registry/test/e2e v0.0.0
	github.com/google/go-cmp v0.7.0
	github.com/google/go-containerregistry v0.22.1
	go.uber.org/goleak v1.3.0
	golang.org/x/sync v0.24.0
)

require (
	github.com/docker/cli v29.7.2+incompatible // indirect
	github.com/docker/docker-credential-helpers v0.9.3 // indirect
	github.com/klauspost/compress v1.19.2 // indirect
	github.com/opencontainers/go-digest v1.0.0 // indirect
	github.com/opencontainers/image-spec v1.1.1 // indirect
	github.com/sirupsen/logrus v1.10.2 // indirect
	golang.org/x/sys v0.49.0 // indirect
)

replace github.com/connected-registry/connected-registry/test/objects => ../objects
