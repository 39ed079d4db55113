package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

func (o *objects) readLink(ctx context.Context, path string) (digest.Digest, error) {
	d, _, err := o.openLink(ctx, path)
	return d, err
}

func (o *objects) openLink(ctx context.Context, path string) (digest.Digest, bucket.Attributes, error) {
	content, at, err := readObject(ctx, o.bucket, objectKey(path))
	if err != nil {
		return "", at, err
	}
	d := digest.Digest(content)
	if !validDigest(d) {
		return "", at, &fs.PathError{Op: "readlink", Path: path, Err: fs.ErrNotExist}
	}
	return d, at, nil
}

func (o *objects) look(ctx context.Context, path string, d digest.Digest) (used time.Time, target digest.Digest, err error) {
	if d.Algorithm() != digest.Canonical {
		target, at, err := o.openLink(ctx, path)
		return o.clock.local(at.Modified), target, err
	}
	at, err := o.bucket.Stat(ctx, objectKey(path))
	if err == nil && at.Size != int64(len(d)) {
		err = &fs.PathError{Op: "readlink", Path: path, Err: fs.ErrNotExist}
	}
	return o.clock.local(at.Modified), d, err
}

// renew puts a link again, if it is there.
func (o *objects) renew(ctx context.Context, path string) error {
	for {
		target, at, err := o.openLink(ctx, path)
		if err != nil {
			return err
		}
		at, err = o.bucket.Put(ctx, objectKey(path), []byte(target), nil, bucket.Conditions{Version: at.Version})
		if errors.Is(err, bucket.ErrCondition) {
			continue // gone, or another link
		}
		if errors.Is(err, fs.ErrPermission) {
			return nil
		}
		if err != nil {
			return err
		}
		o.clock.seen(at)
		waited, err := o.rely(ctx, path)
		if !waited || err != nil {
			return err
		}
	}
}

func (o *objects) rescue(ctx context.Context, path string) bool {
	spared, err := o.spare(ctx, path)
	if err != nil || !spared {
		return false
	}
	_, err = o.bucket.Stat(ctx, objectKey(path))
	return err == nil
}

func (o *objects) putLink(ctx context.Context, path string, target digest.Digest) (made bool, err error) {
	for range 10 {
		at, err := o.bucket.Put(ctx, objectKey(path), []byte(target), nil, bucket.Conditions{Absent: !made})
		if errors.Is(err, bucket.ErrCondition) {
			at, err = o.bucket.Put(ctx, objectKey(path), []byte(target), nil, bucket.Conditions{})
		} else if err == nil {
			made = true
		}
		if err != nil {
			return made, err
		}
		o.clock.seen(at)
		waited, err := o.rely(ctx, path)
		if !waited || err != nil {
			return made, err
		}
		// It was being deleted, and may be gone.
	}
	return made, fmt.Errorf("linking to %s: %w", target, errReaping)
}

// links lists the tombstones first: what was used after they were put is then
// seen to have been.
func (o *objects) links(ctx context.Context, folder string) ([]link, error) {
	graves, err := o.graves(ctx, folder)
	if err != nil {
		return nil, err
	}
	var links []link
	prefix := objectKey(folder) + "/"
	for at, err := range o.bucket.List(ctx, prefix, "", "") {
		if err != nil {
			return nil, err
		}
		path := "/" + at.Key
		alg, rest, _ := strings.Cut(strings.TrimPrefix(at.Key, prefix), "/")
		hex, ok := strings.CutSuffix(rest, "/link")
		d := digest.Digest(alg + ":" + hex)
		if !ok || !validDigest(d) {
			continue
		}
		l := link{name: d, path: path, target: d, used: o.clock.local(at.Modified)}
		if d.Algorithm() != digest.Canonical {
			l.target, err = o.readLink(ctx, path)
		} else if at.Size != int64(len(d)) {
			err = fs.ErrNotExist
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if g, ok := graves[path]; ok && g.State != stateRescued {
			l.condemned = g.since
		}
		links = append(links, l)
	}
	return links, nil
}

// graves reads the tombstones of what lies below a folder, by path.
func (o *objects) graves(ctx context.Context, folder string) (map[string]grave, error) {
	var paths []string
	for at, err := range o.bucket.List(ctx, limboKey(folder)+"/", "", "") {
		if err != nil {
			return nil, err
		}
		paths = append(paths, strings.TrimPrefix(at.Key, limboDir))
	}
	var mu sync.Mutex
	graves := make(map[string]grave, len(paths))
	err := inParallel(ctx, paths, func(ctx context.Context, path string) error {
		g, err := o.grave(ctx, path)
		if err != nil {
			return ignoreAbsent(err)
		}
		mu.Lock()
		defer mu.Unlock()
		graves[path] = g
		return nil
	})
	return graves, err
}

func (o *objects) condemn(ctx context.Context, l link) (used time.Time, err error) {
	if _, err := o.sentence(ctx, l.path); err != nil {
		return time.Time{}, err
	}
	used, _, err = o.look(ctx, l.path, l.name)
	return used, err
}

func (o *objects) reap(ctx context.Context, all []link, cutoff time.Time) (reaped bool, err error) {
	r := o.reaper(ctx)
	defer r.release()
	var manifests, layers []string
	for _, l := range all {
		if strings.Contains(l.path, "/_manifests/") {
			manifests = append(manifests, l.path)
		} else {
			layers = append(layers, l.path)
		}
	}
	for _, paths := range [][]string{manifests, layers} {
		if ok, err := r.claim(paths); !ok {
			return false, err
		}
	}
	used := errors.New("it was used")
	err = inParallel(r.ctx, all, func(ctx context.Context, l link) error {
		last, _, err := o.look(ctx, l.path, l.name)
		if err == nil && last.After(cutoff) {
			return used
		}
		return ignoreAbsent(err)
	})
	if errors.Is(err, used) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	// Manifests first: should this end half way, nothing refers to what is gone.
	for _, paths := range [][]string{manifests, layers} {
		if err := r.remove(paths); err != nil {
			return false, err
		}
	}
	return true, nil
}
