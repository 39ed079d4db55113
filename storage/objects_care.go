package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// verifyBlob reads a blob as it comes, and seals what is right by giving it the
// metadata that it lacks.
func (o *objects) verifyBlob(ctx context.Context, d digest.Digest) (checked, error) {
	c, at, err := o.hashBlob(ctx, d, nil)
	if err != nil || c.aside != "" || at.Metadata[sealName] == d.String() {
		return c, err
	}
	err = o.bucket.Copy(ctx, at.Key, at.Version, at.Key, sealOf(d))
	if err != nil && !errors.Is(err, bucket.ErrCondition) { // on which another has sealed it, or replaced it
		o.log.Warn("blob could not be sealed and will be hashed again when it is read", "digest", d, "error", err)
	}
	return c, nil
}

func (o *objects) scrubBlob(ctx context.Context, d digest.Digest, pace func(n int)) (checked, error) {
	c, _, err := o.hashBlob(ctx, d, pace)
	return c, err
}

// hashBlob reads a blob from its beginning to its end, and sets it aside if it is
// wrong.
func (o *objects) hashBlob(ctx context.Context, d digest.Digest, pace func(n int)) (checked, bucket.Attributes, error) {
	at, err := o.bucket.Stat(ctx, blobKey(d))
	if err != nil {
		return checked{}, at, err
	}
	c := checked{size: at.Size, version: version{tag: at.Version, final: true}}
	content := o.content(ctx, d, at)
	defer func() { _ = content.Close() }() // it was only read
	verifier := d.Verifier()
	if _, err := io.CopyBuffer(verifier, &contextReader{ctx, content, pace}, make([]byte, bufferSize)); err != nil {
		return c, at, fmt.Errorf("verifying %s: %w", d, err)
	}
	if !verifier.Verified() {
		c.aside, err = o.setAside(ctx, d, at)
	}
	return c, at, err
}

// setAside copies a corrupt blob to where it can be looked at, and deletes it as
// the collector would: whoever makes a link to it meanwhile, or has just put it
// anew, waits, and finds out.
func (o *objects) setAside(ctx context.Context, d digest.Digest, bad bucket.Attributes) (aside string, err error) {
	key := quarantineDir + "/" + entryName(d)
	err = o.bucket.Copy(ctx, bad.Key, bad.Version, key, nil)
	if errors.Is(err, bucket.ErrCondition) {
		return "", &fs.PathError{Op: "open", Path: blobPath(d), Err: fs.ErrNotExist}
	}
	if err != nil {
		return "", fmt.Errorf("setting corrupt blob %s aside: %w", d, err)
	}
	r := o.reaper(ctx)
	defer r.release()
	if err := r.seize(blobPath(d)); err != nil {
		return "", err
	}
	now, err := o.bucket.Stat(r.ctx, bad.Key)
	if err == nil && (now.Version != bad.Version || !now.Modified.Equal(bad.Modified)) {
		err = &fs.PathError{Op: "open", Path: blobPath(d), Err: fs.ErrNotExist}
	}
	if err != nil {
		return "", errors.Join(err, o.bucket.Delete(ctx, key))
	}
	return o.bucket.String() + "/" + key, r.remove([]string{blobPath(d)})
}

// seize has a tombstone say reaping whatever it says, or is there at all.
func (r *reaper) seize(path string) error {
	for {
		g, err := r.o.grave(r.ctx, path)
		if ignoreAbsent(err) != nil {
			return err
		}
		if err == nil && g.State == stateReaping && !r.o.waiting(g) {
			return fmt.Errorf("%s: %w", path, errReaping)
		}
		g, err = r.o.bury(r.ctx, path, stateReaping, g)
		if errors.Is(err, bucket.ErrCondition) {
			continue
		}
		r.graves[path] = g
		return err
	}
}

func (o *objects) sweep(ctx context.Context, repositories []string, uploads, aside time.Time) (Swept, error) {
	var swept Swept
	for _, name := range repositories {
		n, err := o.sweepUploads(ctx, repositoriesRoot+name+"/_uploads", uploads)
		swept.Uploads += n
		if err == nil {
			err = o.sweepTags(ctx, repositoriesRoot+name+"/_manifests/tags", uploads)
		}
		if err != nil {
			return swept, err
		}
	}
	if err := o.sweepParts(ctx, "", uploads); err != nil {
		return swept, err
	}
	if err := o.sweepTombs(ctx); err != nil {
		return swept, err
	}
	for at, err := range o.bucket.List(ctx, quarantineDir+"/", "", "") {
		if err == nil && o.clock.local(at.Modified).Before(aside) {
			err = o.bucket.Delete(ctx, at.Key)
			swept.Temporary++
		}
		if err != nil {
			return swept, err
		}
	}
	return swept, nil
}

// sweepUploads removes uploads of which nothing was written since then.
func (o *objects) sweepUploads(ctx context.Context, folder string, then time.Time) (n int, err error) {
	last := make(map[string]time.Time)
	err = o.walk(ctx, folder, func(file string, modified func() (time.Time, error)) error {
		id, _, _ := strings.Cut(strings.TrimPrefix(file, folder+"/"), "/")
		at, err := modified()
		if at.After(last[id]) {
			last[id] = at
		}
		return err
	})
	for id, at := range last {
		if err != nil {
			break
		}
		if at.Before(then) {
			n++
			err = errors.Join(o.sweepParts(ctx, objectKey(folder+"/"+id+"/data"), then), o.removeUpload(ctx, folder+"/"+id))
		}
	}
	return n, err
}

// sweepTags removes what there is of tags that name nothing, as a push leaves them
// that ended half way before then.
func (o *objects) sweepTags(ctx context.Context, folder string, then time.Time) error {
	last := make(map[string]time.Time)
	err := o.walk(ctx, folder, func(file string, modified func() (time.Time, error)) error {
		tag, rest, _ := strings.Cut(strings.TrimPrefix(file, folder+"/"), "/")
		at, err := modified()
		if rest == "current/link" {
			at = time.Now()
		}
		if at.After(last[tag]) {
			last[tag] = at
		}
		return err
	})
	for tag, at := range last {
		if err == nil && at.Before(then) {
			_, err = o.files.deleteTree(ctx, folder+"/"+tag+"/index")
		}
	}
	return err
}

// sweepParts aborts uploads in parts of the object store's, of one key or all,
// that nobody can go on with: begun before then, and no upload of ours knows of
// them, or that one is as old. MinIO, which does not tell of all, aborts them by
// itself.
func (o *objects) sweepParts(ctx context.Context, key string, then time.Time) error {
	for u, err := range o.bucket.Uploads(ctx, key) {
		if err != nil {
			return err
		}
		if !o.clock.local(u.Begun).Before(then) {
			continue
		}
		at, err := o.bucket.Stat(ctx, u.Key+uploadSuffix)
		if errors.Is(err, fs.ErrNotExist) || err == nil && o.clock.local(at.Modified).Before(then) {
			err = o.bucket.Abort(ctx, u.Key, u.Upload)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
