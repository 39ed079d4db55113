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

// trace is the HTTP traffic of one or more pulls.
type trace []exchange

// asked lists the host:ports that requests went to, answered or not, in the
// order of their first use.
func (tr trace) asked() []string {
	return tr.hosts(func(e exchange) bool { return e.Status == 0 })
}

// served lists the host:ports that content came from, in the order of their
// first use.
func (tr trace) served() []string {
	return tr.hosts(func(e exchange) bool { return e.Status/100 == 2 })
}

func (tr trace) hosts(match func(exchange) bool) []string {
	var hosts []string
	for _, e := range tr {
		if match(e) && !slices.Contains(hosts, e.Host) {
			hosts = append(hosts, e.Host)
		}
	}
	return hosts
}

// cacheStatus counts the answers with content by what their Cache-Status says,
// without the name of the cache.
func (tr trace) cacheStatus() map[string]int {
	counts := map[string]int{}
	for _, e := range tr {
		if e.Status/100 == 2 {
			_, status, _ := strings.Cut(e.CacheStatus, "; ")
			counts[status]++
		}
	}
	return counts
}

// cacheMissed says whether the cache had to fetch any of the content.
func (tr trace) cacheMissed() bool {
	return slices.ContainsFunc(tr, func(e exchange) bool {
		return e.Status/100 == 2 && strings.Contains(e.CacheStatus, "fwd=")
	})
}

// resumed says whether host was asked for the rest of a blob from its middle.
func (tr trace) resumed(host string) bool {
	return slices.ContainsFunc(tr, func(e exchange) bool {
		return e.Host == host && e.Range != "" && !strings.HasPrefix(e.Range, "bytes=0-")
	})
}
