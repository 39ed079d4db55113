//go:build !linux

package storage

import (
	"io/fs"
	"os"
	"time"
)

func statFile(path string) (modified time.Time, size int64, err error) {
	fi, err := os.Stat(path)
	if err != nil {
		return time.Time{}, 0, err
	}
	return fi.ModTime(), fi.Size(), nil
}

func changed(fi fs.FileInfo) time.Time { return fi.ModTime() }

func dropCache(*os.File) {}
