package storage

import (
	"errors"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// setModTime sets the modification time of the open file and leaves its access
// time alone. It goes by descriptor: a path could by now name another file.
func setModTime(f *os.File, t time.Time) error {
	times := [2]unix.Timespec{
		{Nsec: unix.UTIME_OMIT},
		unix.NsecToTimespec(t.UnixNano()),
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno unix.Errno
	err = conn.Control(func(fd uintptr) {
		// futimens(3), which has no wrapper in x/sys: utimensat(2) with a
		// null path.
		_, _, errno = unix.Syscall6(unix.SYS_UTIMENSAT, fd, 0, uintptr(unsafe.Pointer(&times)), 0, 0, 0)
	})
	if err != nil {
		return err
	}
	if errno != 0 {
		return os.NewSyscallError("utimensat", errno)
	}
	return nil
}

func readOnlyFS(err error) bool { return errors.Is(err, unix.EROFS) }
