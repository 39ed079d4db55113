package cache

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// diskFree returns the bytes that can still be written to dir's file system.
func diskFree(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// allocate takes disk space for n bytes at offset without changing the size of
// the file. Errors: errors.ErrUnsupported where the file system cannot,
// errNoSpace where there is none.
func allocate(f *os.File, offset, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, offset, n)
		switch err {
		case unix.EINTR:
			continue
		case unix.ENOSPC, unix.EDQUOT, unix.EFBIG:
			return fmt.Errorf("%w: %w", errNoSpace, err)
		case nil:
			return nil
		default:
			return os.NewSyscallError("fallocate", err)
		}
	}
}

// idlePriority makes the calling thread, which the caller has locked, use disk
// and processor only when nobody else does. Where that is not possible, it
// stays as it was.
func idlePriority() {
	const (
		whoProcess = 1 // IOPRIO_WHO_PROCESS: with 0, the calling thread
		classIdle  = 3 << 13
	)
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, whoProcess, 0, classIdle)
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 19)
}

// forget drops what the kernel holds of the file in memory.
func forget(f *os.File) {
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// unread returns how many bytes a connection has received that nobody has read.
func unread(conn syscall.RawConn) (n int) {
	_ = conn.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
	return n
}

// accessTime returns the time of the last use in Unix seconds.
func accessTime(fi fs.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Atim.Sec
	}
	return fi.ModTime().Unix()
}

// lockFile takes the file for this process, until it is closed.
func lockFile(f *os.File) error {
	return os.NewSyscallError("flock", unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB))
}
