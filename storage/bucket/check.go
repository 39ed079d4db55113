package bucket

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// checkPatience bounds how long the remains of a check are cleared away.
const checkPatience = 10 * time.Second

// Check proves on the live object store that it can be written, read, listed in
// byte order and cleared, and that it honours the conditions of Put, without
// which replicas would overwrite each other's work. It leaves nothing behind.
// The error names what is missing and the remedy.
func Check(ctx context.Context, b Bucket) (err error) {
	folder := "check-" + strings.ToLower(rand.Text()) + "/"
	var keys []string
	for _, name := range []string{"a-b", "a.b", "a/b", "a0"} {
		keys = append(keys, folder+name)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkPatience)
		defer cancel()
		if err2 := clear(ctx, b, folder, keys); err == nil {
			err = err2
		}
	}()
	if err := checkConditions(ctx, b, keys[0]); err != nil {
		return err
	}
	return checkList(ctx, b, folder, keys)
}

func checkConditions(ctx context.Context, b Bucket, key string) error {
	first, err := b.Put(ctx, key, []byte("first"), map[string]string{"check": "first"}, Conditions{Absent: true})
	if err != nil {
		return err
	}
	const remedy = "use an object store that does, or a newer release of this one"
	switch _, err := b.Put(ctx, key, []byte("again"), nil, Conditions{Absent: true}); {
	case err == nil:
		return fmt.Errorf("%s: the object store does not honour If-None-Match of a write (an object that was there was replaced), which several replicas need: %s", b, remedy)
	case !errors.Is(err, ErrCondition):
		return err
	}
	second, err := b.Put(ctx, key, []byte("second"), map[string]string{"check": "second"}, Conditions{Version: first.Version})
	if errors.Is(err, ErrCondition) {
		return fmt.Errorf("%s: the object store takes no write with If-Match and the version that it named itself: %s", b, remedy)
	} else if err != nil {
		return err
	}
	switch _, err := b.Put(ctx, key, []byte("late"), nil, Conditions{Version: first.Version}); {
	case err == nil:
		return fmt.Errorf("%s: the object store does not honour If-Match of a write (an object that had changed was replaced), which several replicas need: %s", b, remedy)
	case !errors.Is(err, ErrCondition):
		return err
	}
	body, at, err := b.Open(ctx, key, 1, -1)
	if err != nil {
		return err
	}
	defer body.Close()
	content, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	if string(content) != "econd" || at.Size != 6 || at.Version != second.Version || at.Metadata["check"] != "second" {
		return fmt.Errorf("%s: the object store returns something else than was written (%q of %d bytes, metadata %v): %s", b, content, at.Size, at.Metadata, remedy)
	}
	return nil
}

func checkList(ctx context.Context, b Bucket, folder string, keys []string) error {
	for _, key := range keys[1:] {
		if _, err := b.Put(ctx, key, nil, nil, Conditions{}); err != nil {
			return err
		}
	}
	var found []string
	for at, err := range b.List(ctx, folder, "", "") {
		if err != nil {
			return err
		}
		found = append(found, at.Key)
	}
	if !slices.Equal(found, keys) {
		return fmt.Errorf("%s: the object store lists %q where %q was written: use one that lists at once what was written, in byte order (a directory bucket or an account with a hierarchical namespace does not)", b, found, keys)
	}
	return nil
}

// clear deletes what a check wrote.
func clear(ctx context.Context, b Bucket, folder string, keys []string) error {
	for _, key := range keys {
		if err := b.Delete(ctx, key); err != nil {
			return err
		}
	}
	for at, err := range b.List(ctx, folder, "", "") {
		if err != nil {
			return err
		}
		return fmt.Errorf("%s: the object store still lists %q after it was deleted: use one that is strongly consistent", b, at.Key)
	}
	return nil
}
