package bucket_test

import (
	"context"
	"errors"
	"iter"
	"slices"
	"strings"
	"testing"

	"github.com/connected-registry/connected-registry/storage/bucket"
	"github.com/connected-registry/connected-registry/storage/internal/membucket"
)

// lax is a bucket with a flaw.
type lax struct {
	*membucket.Bucket
	when func(bucket.Conditions) bucket.Conditions // that are honoured
	list func([]bucket.Attributes) []bucket.Attributes
}

func (l lax) Put(ctx context.Context, key string, content []byte, metadata map[string]string, when bucket.Conditions) (bucket.Attributes, error) {
	return l.Bucket.Put(ctx, key, content, metadata, l.when(when))
}

func (l lax) List(ctx context.Context, prefix, after, delimiter string) iter.Seq2[bucket.Attributes, error] {
	return func(yield func(bucket.Attributes, error) bool) {
		var all []bucket.Attributes
		for at, err := range l.Bucket.List(ctx, prefix, after, delimiter) {
			if err != nil {
				yield(at, err)
				return
			}
			all = append(all, at)
		}
		for _, at := range l.list(all) {
			if !yield(at, nil) {
				return
			}
		}
	}
}

func TestCheck(t *testing.T) {
	same := func(c bucket.Conditions) bucket.Conditions { return c }
	whole := func(a []bucket.Attributes) []bucket.Attributes { return a }
	refused := errors.New("not allowed")
	for name, test := range map[string]struct {
		lax
		want string
	}{
		"sound":      {lax{new(membucket.Bucket), same, whole}, ""},
		"no Absent":  {lax{new(membucket.Bucket), func(c bucket.Conditions) bucket.Conditions { c.Absent = false; return c }, whole}, "If-None-Match"},
		"no Version": {lax{new(membucket.Bucket), func(c bucket.Conditions) bucket.Conditions { c.Version = ""; return c }, whole}, "If-Match"},
		"other version": {lax{new(membucket.Bucket), func(c bucket.Conditions) bucket.Conditions {
			if c.Version != "" {
				c.Version += "-weak"
			}
			return c
		}, whole}, "If-Match"},
		"no order": {lax{new(membucket.Bucket), same, func(a []bucket.Attributes) []bucket.Attributes { slices.Reverse(a); return a }}, "byte order"},
		"late":     {lax{new(membucket.Bucket), same, func([]bucket.Attributes) []bucket.Attributes { return nil }}, "byte order"},
		"no deletion": {lax{&membucket.Bucket{Before: func(_ context.Context, method, _ string) error {
			if method == "Delete" {
				return refused
			}
			return nil
		}}, same, whole}, "not allowed"},
	} {
		t.Run(name, func(t *testing.T) {
			err := bucket.Check(t.Context(), test.lax)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if name == "no deletion" {
				return
			}
			for at := range test.Bucket.List(t.Context(), "", "", "") {
				t.Errorf("left behind: %s", at.Key)
			}
		})
	}
}
