package storage

import (
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fileID tells a file from every other that is there at the same time.
type fileID struct{ device, inode uint64 }

// statFile returns when a file was last written to, and its size in bytes.
func statFile(path string) (modified time.Time, size int64, err error) {
	modified, size, _, err = statID(path)
	return modified, size, err
}

// statID is statFile that also says which file it is. It costs one system call
// and no more.
func statID(path string) (modified time.Time, size int64, id fileID, err error) {
	var st unix.Stat_t
	for {
		err = unix.Stat(path, &st)
		if err == nil {
			return time.Unix(st.Mtim.Unix()), st.Size, fileID{st.Dev, st.Ino}, nil
		}
		if err != unix.EINTR {
			return time.Time{}, 0, fileID{}, &fs.PathError{Op: "stat", Path: path, Err: err}
		}
	}
}

// idOf is the identity of a file that was looked at.
func idOf(fi fs.FileInfo) fileID {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return fileID{st.Dev, st.Ino}
	}
	return fileID{}
}

// changed is when anything about a file last changed, its name included.
func changed(fi fs.FileInfo) time.Time {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return time.Unix(st.Ctim.Unix())
	}
	return fi.ModTime()
}

// dropCache has the next read of a file come from the medium, and not from what
// the kernel remembers of it.
func dropCache(f *os.File) {
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // advice
}
