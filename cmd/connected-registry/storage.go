package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"github.com/connected-registry/connected-registry/storage/bucket"
)

// storageFlag is --storage: an object store that content lies in, in place of the
// data directory.
type storageFlag struct{ file string }

func (f *storageFlag) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.file, "storage", "", "file that names the object store in which the content lies, in YAML; empty: it lies in --data")
}

// open returns nil without the flag. Nothing is asked of the object store yet.
func (f *storageFlag) open(ctx context.Context) (bucket.Bucket, error) {
	if f.file == "" {
		return nil, nil
	}
	config, err := bucket.Load(f.file)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%w: give the file that names the object store with --storage", err)
	}
	if err == nil {
		var b bucket.Bucket
		if b, err = bucket.Open(ctx, config); err == nil {
			return b, nil
		}
	}
	return nil, errors.New(strings.ReplaceAll(err.Error(), "\n", "; "))
}
