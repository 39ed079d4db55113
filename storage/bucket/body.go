package bucket

import (
	"errors"
	"io"
)

// body reads an object. What breaks off is gone on with, of the same version.
type body struct {
	from    io.ReadCloser
	offset  int64 // of the next byte
	left    int64 // bytes to come
	fails   int   // in a row, without a byte
	ended   func() error
	reopen  func(offset, length int64) (io.ReadCloser, error)
	explain func(error) error
	failed  error
}

func (b *body) Read(p []byte) (int, error) {
	for {
		if b.failed != nil {
			return 0, b.failed
		}
		if b.left == 0 {
			return 0, io.EOF
		}
		if len(p) == 0 {
			return 0, nil
		}
		n, err := b.from.Read(p[:min(int64(len(p)), b.left)])
		b.offset, b.left = b.offset+int64(n), b.left-int64(n)
		if n > 0 {
			b.fails = 0
			return n, nil
		}
		if err != nil {
			b.resume(err)
		}
	}
}

// resume opens the object again where it broke off.
func (b *body) resume(err error) {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	b.from.Close()
	b.fails++
	if network(err).kind == silent {
		b.fails++ // that took long
	}
	if b.fails > 3 || b.ended() != nil {
		b.failed = b.explain(err)
		return
	}
	from, err := b.reopen(b.offset, b.left)
	if err != nil {
		b.failed = b.explain(err)
		return
	}
	b.from = from
}

func (b *body) Close() error { return b.from.Close() }

// section is size bytes of a reader, from start on. What is shorter is an error.
type section struct {
	io.ReadSeeker
	start, size int64
	at          int64
}

func (s *section) Read(p []byte) (int, error) {
	if s.at >= s.size {
		return 0, io.EOF
	}
	n, err := s.ReadSeeker.Read(p[:min(int64(len(p)), s.size-s.at)])
	if s.at += int64(n); errors.Is(err, io.EOF) && s.at < s.size {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (s *section) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += s.at
	case io.SeekEnd:
		offset += s.size
	}
	if _, err := s.ReadSeeker.Seek(s.start+offset, io.SeekStart); err != nil {
		return 0, err
	}
	s.at = offset
	return offset, nil
}
