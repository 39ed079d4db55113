package registry

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage"
)

// serveQuota runs a replica on a store, with a quota.
func serveQuota(t *testing.T, store *storage.Store, spec string) *client {
	rules := rulesOf(t, spec)
	return serveHandler(t, newServer(t, Config{Store: store, Rules: func() *Rules { return rules }}))
}

// TestQuotaHoldsAtOnce has many clients push at the same time, each less than
// there is room for and all together more.
func TestQuotaHoldsAtOnce(t *testing.T) {
	for _, known := range []bool{true, false} {
		for quota, repository := range map[string]string{
			"  quota: {total: 1Mi}\n":         "team/app%d",
			"  quota: {perRepository: 1Mi}\n": "team/app",
		} {
			store := openStore(t)
			c := serveQuota(t, store, quota)
			var pushing sync.WaitGroup
			var mu sync.Mutex
			pushed := 0
			for i := range 16 {
				name := strings.Replace(repository, "%d", fmt.Sprint(i), 1)
				pushing.Go(func() {
					content := randomBytes(300_000)
					at := c.do("POST", "/v2/"+name+"/blobs/uploads/", nil)
					if at.status != http.StatusAccepted {
						return // full already
					}
					var body io.Reader = bytes.NewReader(content)
					if !known {
						body = io.MultiReader(body)
					}
					a := c.do("PUT", at.header.Get("Location")+"?digest="+digest.FromBytes(content).String(), body)
					switch a.status {
					case http.StatusCreated:
						mu.Lock()
						pushed++
						mu.Unlock()
					case http.StatusForbidden:
					default:
						t.Errorf("%d %s", a.status, a.body)
					}
				})
			}
			pushing.Wait()
			if pushed < 1 || pushed > 3 {
				t.Errorf("%q, length known: %v: %d blobs of 300 kB fitted", quota, known, pushed)
			}
			// Room that was claimed in vain is there again.
			for ; pushed < 3; pushed++ {
				c.pushBlob(strings.Replace(repository, "%d", "", 1), randomBytes(300_000))
			}
			a := c.do("POST", "/v2/"+strings.Replace(repository, "%d", "", 1)+"/blobs/uploads/?digest="+digest.FromString("").String(), randomBytes(300_000))
			c.want(a, 403, "DENIED")
		}
	}
}

// TestQuotaOfOtherReplicas has another replica complete a push while this one
// receives.
func TestQuotaOfOtherReplicas(t *testing.T) {
	store := openStore(t)
	other := openSame(t, store)
	one, two := serveQuota(t, store, "  quota: {total: 1Mi}\n"), serveQuota(t, other, "  quota: {total: 1Mi}\n")
	content := randomBytes(600_000)
	at := one.want(one.do("POST", "/v2/app/blobs/uploads/", nil), 202, "").header.Get("Location")
	one.want(one.do("PATCH", at, content), 202, "")
	two.pushBlob("app", randomBytes(600_000))
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		_, total, err := store.Used(t.Context(), "app")
		if err != nil {
			t.Fatal(err)
		}
		if total >= 600_000 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("one replica never learns what the other stored")
		}
		if err := other.Close(); err != nil { // which writes its figures
			t.Fatal(err)
		}
	}
	one.want(one.do("PUT", at+"?digest="+digest.FromBytes(content).String(), nil), 403, "DENIED")
	noUploads(t, store.Root(), "app")
}
