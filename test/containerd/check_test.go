package containerd

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// pullAndCheck pulls ref, which must be there to pull, and verifies that what
// containerd then holds is image, down to the bytes of the unpacked files.
func pullAndCheck(t *testing.T, d *daemon, ref string, image *testImage) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	id, err := d.pull(ctx, ref)
	if err != nil {
		t.Fatalf("pulling %s: %v", ref, err)
	}
	check(t, d, ref, id, image)
}

func check(t *testing.T, d *daemon, ref, id string, image *testImage) {
	t.Helper()
	if id != image.id {
		t.Errorf("pulling %s: image %s, want %s", ref, id, image.id)
	}
	resp, err := d.images.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatal(err)
	}
	repository, _, _ := strings.Cut(ref, "@")
	if slash, colon := strings.LastIndex(repository, "/"), strings.LastIndex(repository, ":"); colon > slash {
		repository = repository[:colon]
	}
	if diff := cmp.Diff([]string{repository + "@" + image.digest}, resp.GetImage().GetRepoDigests()); diff != "" {
		t.Errorf("repository digests of %s (-want +got):\n%s", ref, diff)
	}
	if diff := cmp.Diff(image.files, d.unpacked(t, ref)); diff != "" {
		t.Errorf("unpacked files of %s (-want +got):\n%s", ref, diff)
	}
}

// hostsAsked lists the host[:port]s of requests in the order of their first
// use.
func hostsAsked(requests []request) []string {
	var hosts []string
	for _, r := range requests {
		if !slices.Contains(hosts, r.Host) {
			hosts = append(hosts, r.Host)
		}
	}
	return hosts
}
