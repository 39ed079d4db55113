package standalone

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPrefetched(t *testing.T) {
	spec := load(t, `
  nodeCache: {prefetchBandwidth: 1Mi}
  mirrors:
  - {registry: docker.io, prefetch: [{images: ["library/nginx:1"]}, {images: ["team/gpu:1"], nodeSelector: {gpu: "yes"}}]}
  - {registry: ghcr.io, prefetch: [{images: ["x/y:2"]}]}
`).Spec
	images, bandwidth := prefetched(&spec)
	if diff := cmp.Diff([]string{"docker.io/library/nginx:1", "ghcr.io/x/y:2"}, images); diff != "" || bandwidth != 1<<20 {
		t.Errorf("%d bytes per second; -want +got:\n%s", bandwidth, diff)
	}
}
