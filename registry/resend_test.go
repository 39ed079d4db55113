package registry

import (
	"bytes"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestUploadSentAgain sends a blob with one PUT, of which a part came through
// before the replica died, and all of it again, as containerd does.
func TestUploadSentAgain(t *testing.T) {
	for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		store := openStore(t)
		c := serveHandler(t, newServer(t, Config{Store: store}))
		content := randomBytes(100_000)
		d := algorithm.FromBytes(content)
		at := c.do("POST", "/v2/up/blobs/uploads/", nil).header.Get("Location")
		c.want(c.do("PATCH", at, content[:30_000]), 202, "") // what is left of the first PUT
		c.want(c.do("PUT", at+"?digest="+d.String(), content), 201, "")
		if got := c.do("GET", "/v2/up/blobs/"+d.String(), nil); !bytes.Equal(got.body, content) {
			t.Errorf("read back %d bytes", len(got.body))
		}
		noUploads(t, store.Root(), "up")
		// The answer got lost: it comes again, to whoever asks for what is there.
		c.want(c.do("PUT", at+"?digest="+d.String(), content), 201, "")
		c.want(c.do("PUT", at+"?digest="+d.String(), nil), 201, "")
		c.want(c.do("PUT", at+"?digest="+digest.FromString("other").String(), nil), 404, "BLOB_UPLOAD_UNKNOWN")
		c.want(c.do("PUT", "/v2/elsewhere/blobs/uploads/"+at[len(at)-36:]+"?digest="+d.String(), nil), 404, "BLOB_UPLOAD_UNKNOWN")
	}
}

// TestLastChunkWithoutRange ends an upload with a chunk that does not say where
// it belongs, right and wrong.
func TestLastChunkWithoutRange(t *testing.T) {
	store := openStore(t)
	c := serveHandler(t, newServer(t, Config{Store: store}))
	content := randomBytes(50_000)
	d := digest.FromBytes(content)
	for _, last := range [][]byte{content[20_000:], content[20_001:], nil} {
		at := c.do("POST", "/v2/up/blobs/uploads/", nil).header.Get("Location")
		c.want(c.do("PATCH", at, content[:20_000]), 202, "")
		if len(last) == 30_000 {
			c.want(c.do("PUT", at+"?digest="+d.String(), last), 201, "")
			continue
		}
		c.want(c.do("PUT", at+"?digest="+d.String(), last), 400, "DIGEST_INVALID")
	}
	noUploads(t, store.Root(), "up")
}
