# syntax=docker/dockerfile:1
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
ARG TARGETOS TARGETARCH VERSION=unknown
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags "-s -w -X main.version=$VERSION" \
    -o /connected-registry ./cmd/connected-registry

# static: CA certificates and a nonroot user, no shell. Pods that must write to
# the node (the agent) ask for root themselves; the image does not.
FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /connected-registry /connected-registry
USER 65532:65532
ENTRYPOINT ["/connected-registry"]
