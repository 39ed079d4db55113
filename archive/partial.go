package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// block is tar's unit. With GNU's format, which holds large sizes in the header
// itself, and with names as short as ours, every header is one block.
const block = 512

// layout is the content of the first file, oci-layout.
const layout = `{"imageLayoutVersion":"` + v1.ImageLayoutVersion + `"}`

// partial is an archive that is being written: blobs first, the index last.
type partial struct {
	*os.File
	end int64 // of the last entry that is whole
	has map[digest.Digest]int64
}

// openPartial opens or begins an archive and keeps of it the entries that are
// whole and right.
func openPartial(ctx context.Context, name string) (*partial, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, fmt.Errorf("creating the archive: %w: give a file in a directory that is there and that you may write to", err)
	}
	p := &partial{File: f, has: make(map[digest.Digest]int64)}
	err = p.recover(ctx)
	if err == nil && p.end == 0 {
		err = p.entry(v1.ImageLayoutFile, strings.NewReader(layout), int64(len(layout)))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return p, nil
}

// recover reads what an earlier export left, up to the first thing that is not
// whole, and cuts off the rest.
func (p *partial) recover(ctx context.Context) error {
	r := tar.NewReader(p.File)
	for {
		header, err := r.Next()
		if err != nil || header.Size < 0 {
			break // the end, or an entry that was being written
		}
		if header.Name == v1.ImageIndexFile {
			break // everything was there but the new name; the index is made anew
		}
		if d, ok := blobDigest(header.Name); ok {
			v := d.Verifier()
			if _, err := io.Copy(v, contextReader{ctx, r}); err != nil && ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if !v.Verified() {
				break
			}
			p.has[d] = header.Size
		} else if header.Name != v1.ImageLayoutFile {
			return p.foreign()
		} else if content, err := io.ReadAll(r); err != nil || string(content) != layout {
			break
		}
		p.end += block + (header.Size+block-1)/block*block
	}
	info, err := p.Stat()
	if err != nil {
		return err
	}
	if p.end == 0 && info.Size() > 2*block {
		return p.foreign()
	}
	return p.Truncate(p.end) // which also adds padding that was not written
}

func (p *partial) foreign() error {
	return fmt.Errorf("%s is there already and is not the beginning of an archive of ours: remove it or give another name", p.Name())
}

// add writes a blob, checking it once more on its way.
func (p *partial) add(ctx context.Context, d digest.Digest, r io.Reader, size int64, report func(int64)) error {
	v := d.Verifier()
	content := &reportReader{io.TeeReader(contextReader{ctx, r}, v), report}
	if err := p.entry(blobName(d), content, size); err != nil {
		return fmt.Errorf("writing %s: %w: export again when that is mended, to go on from here", d, err)
	}
	if !v.Verified() {
		p.end -= block + (size+block-1)/block*block
		return fmt.Errorf("%s changed while it was read: its bytes are not those of the digest", d)
	}
	p.has[d] = size
	return nil
}

// entry writes one entry after the last.
func (p *partial) entry(name string, content io.Reader, size int64) error {
	if _, err := p.Seek(p.end, io.SeekStart); err != nil {
		return err
	}
	w := tar.NewWriter(p.File)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, Typeflag: tar.TypeReg, Format: tar.FormatGNU}); err != nil {
		return err
	}
	n, err := io.Copy(w, io.LimitReader(content, size+1))
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		return err
	}
	p.end += block + (size+block-1)/block*block
	return nil
}

// finish writes the index and gives the archive its name.
func (p *partial) finish(index []byte, name string) error {
	if err := p.entry(v1.ImageIndexFile, strings.NewReader(string(index)), int64(len(index))); err != nil {
		return fmt.Errorf("writing the index: %w", err)
	}
	_, err := p.Write(make([]byte, 2*block))
	if err == nil {
		err = p.Truncate(p.end + 2*block)
	}
	if err == nil {
		err = p.Sync()
	}
	if err != nil {
		return fmt.Errorf("writing the archive: %w", err)
	}
	if err := os.Rename(p.Name(), name); err != nil {
		return fmt.Errorf("naming the archive: %w", err)
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

func blobName(d digest.Digest) string {
	return path.Join(v1.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// blobDigest is the digest that a blob's name stands for.
func blobDigest(name string) (digest.Digest, bool) {
	parts := strings.Split(path.Clean(name), "/")
	if len(parts) != 3 || parts[0] != v1.ImageBlobsDir {
		return "", false
	}
	d := digest.NewDigestFromEncoded(digest.Algorithm(parts[1]), parts[2])
	return d, d.Validate() == nil
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context //nolint:containedctx // lives as long as one copy
	r   io.Reader
}

func (r contextReader) Read(b []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	n, err := r.r.Read(b)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF // a cut entry is a short one
	}
	return n, err
}

type reportReader struct {
	io.Reader
	report func(int64)
}

func (r *reportReader) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if n > 0 {
		r.report(int64(n))
	}
	return n, err
}
