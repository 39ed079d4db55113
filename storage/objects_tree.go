package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// Folders are what keys have in common: none is made, and none is left.

func (o *objects) readFile(ctx context.Context, path string) ([]byte, error) {
	content, _, err := readObject(ctx, o.bucket, objectKey(path))
	return content, err
}

func (o *objects) putFile(ctx context.Context, path string, content []byte) error {
	return o.files.PutContent(ctx, path, content)
}

func (o *objects) createFile(ctx context.Context, path string, content []byte) error {
	_, err := o.bucket.Put(ctx, objectKey(path), content, nil, bucket.Conditions{Absent: true})
	if errors.Is(err, bucket.ErrCondition) {
		return &fs.PathError{Op: "create", Path: path, Err: fs.ErrExist}
	}
	return err
}

// move copies and deletes. It goes on when the client that waits for it is gone:
// the content is there, whole, and would have to come again.
func (o *objects) move(ctx context.Context, from, to string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), moveTime)
	defer cancel()
	if d, ok := parseBlobPath(to); ok {
		if err := o.moveToBlob(ctx, from, d); err != nil {
			return err
		}
	} else if err := o.bucket.Copy(ctx, objectKey(from), "", objectKey(to), nil); err != nil {
		return err
	}
	if err := o.bucket.Delete(ctx, objectKey(from)); err != nil || !isUploadData(from) {
		return err
	}
	return o.bucket.Delete(ctx, objectKey(from)+uploadSuffix)
}

// moveToBlob seals a blob if the very object that it becomes is known to be right.
// What is not known to be that is hashed when it is first read.
func (o *objects) moveToBlob(ctx context.Context, from string, d digest.Digest) error {
	if _, err := o.rely(ctx, blobPath(d)); err != nil {
		return err
	}
	if !isUploadData(from) {
		return o.bucket.Copy(ctx, objectKey(from), "", blobKey(d), nil)
	}
	at, known, err := o.files.placed(ctx, from)
	if err != nil {
		return err
	}
	var seal map[string]string
	switch known {
	case d:
		seal = sealOf(d)
	case "":
	default:
		return fmt.Errorf("%s: %w (it is %s), and is not stored as %s", from, errContinued, known, d)
	}
	err = o.bucket.Copy(ctx, at.Key, at.Version, blobKey(d), seal)
	if errors.Is(err, bucket.ErrCondition) {
		return fmt.Errorf("%s: %w", from, errContinued)
	}
	return err
}

// moveTime is how long the copy of a blob may take. It is made by the object
// store itself.
const moveTime = time.Hour

// remove leaves tombstones alone: a collector that is at work under one is not to
// lose it. They say nothing when what they are about is gone.
func (o *objects) remove(ctx context.Context, path string) error {
	err := o.files.Delete(ctx, path)
	if isAbsent(err) {
		return &fs.PathError{Op: "remove", Path: path, Err: fs.ErrNotExist}
	}
	return err
}

func (o *objects) removeUpload(ctx context.Context, path string) error {
	ctx, cancel := o.files.upload(ctx, path+"/")
	defer cancel()
	_, err := o.files.deleteTree(ctx, path)
	return err
}

func (o *objects) list(ctx context.Context, path string) ([]entry, error) {
	infos, err := o.files.children(ctx, path)
	if isAbsent(err) {
		return nil, &fs.PathError{Op: "list", Path: path, Err: fs.ErrNotExist}
	}
	entries := make([]entry, len(infos))
	for i, info := range infos {
		entries[i] = entry{name: info.path[strings.LastIndexByte(info.path, '/')+1:], folder: info.dir}
	}
	return entries, err
}

func (o *objects) walk(ctx context.Context, path string, visit func(file string, modified func() (time.Time, error)) error) error {
	for at, err := range o.bucket.List(ctx, objectKey(path)+"/", "", "") {
		if err != nil {
			return err
		}
		modified := func() (time.Time, error) { return o.clock.local(at.Modified), nil }
		if err := visit("/"+at.Key, modified); err != nil {
			return err
		}
	}
	return nil
}

func (o *objects) prune(context.Context, string, bool) error { return nil }

// repositories asks for each folder of names what is in it, which leaves out what
// the repositories hold.
func (o *objects) repositories(ctx context.Context) ([]string, error) {
	if err := o.measure(ctx); err != nil { // a collection begins
		return nil, err
	}
	var names []string
	root := objectKey(repositoriesRoot)
	for todo := []string{root}; len(todo) > 0; {
		dir := todo[0]
		todo = todo[1:]
		is := false
		for at, err := range o.bucket.List(ctx, dir, "", "/") {
			if err != nil {
				return nil, err
			}
			switch name, folder := strings.CutSuffix(strings.TrimPrefix(at.Key, dir), "/"); {
			case !folder:
			case strings.HasPrefix(name, "_"):
				is = true
			default:
				todo = append(todo, at.Key)
			}
		}
		if is && dir != root {
			names = append(names, strings.TrimSuffix(strings.TrimPrefix(dir, root), "/"))
		}
	}
	return names, nil
}

// Notes are objects.

func (o *objects) readNote(ctx context.Context, name string) ([]byte, error) {
	content, _, err := readObject(ctx, o.bucket, name)
	return content, err
}

func (o *objects) writeNote(ctx context.Context, name string, content []byte, _ bool) error {
	_, err := o.bucket.Put(ctx, name, content, nil, bucket.Conditions{})
	return err
}

func (o *objects) moveNote(ctx context.Context, from, to string, content []byte) error {
	if err := o.writeNote(ctx, to, content, true); err != nil {
		return err
	}
	return o.removeNote(ctx, from)
}

func (o *objects) removeNote(ctx context.Context, name string) error {
	return o.bucket.Delete(ctx, name)
}

func (o *objects) listNotes(ctx context.Context, folder string) ([]noteInfo, error) {
	infos, err := o.files.folder(ctx, folder+"/")
	notes := make([]noteInfo, len(infos))
	for i, info := range infos {
		name := info.path[strings.LastIndexByte(info.path, '/')+1:]
		modified := func() (time.Time, error) { return o.clock.local(info.modified), nil }
		notes[i] = noteInfo{entry: entry{name: name, folder: info.dir}, modified: modified}
	}
	return notes, err
}
