package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// target is one request that is made over and over.
type target struct {
	addr   string
	tls    *tls.Config // nil: plain HTTP
	method string
	path   string
	accept string
	traced bool // every request bears a trace of its own, so that no two are the same
}

func (t target) dial() (net.Conn, error) {
	if t.tls != nil {
		return tls.Dial("tcp", t.addr, t.tls)
	}
	return net.Dial("tcp", t.addr)
}

func (t target) request() []byte {
	accept := t.accept
	if accept == "" {
		accept = "*/*"
	}
	return fmt.Appendf(nil, "%s %s HTTP/1.1\r\nHost: %s\r\nAccept: %s\r\nUser-Agent: bench\r\n\r\n", t.method, t.path, t.addr, accept)
}

// requests is what a round of small requests has found.
type requests struct {
	count     int
	perSecond float64
	p50, p99  time.Duration
}

// askFor makes requests on so many connections for the given time. The clients
// are as plain as can be, since they share the processors with the server.
func askFor(t target, connections int, during time.Duration) (requests, error) {
	var took []time.Duration
	start := time.Now()
	until := start.Add(during)
	err := each(connections, func(mu *sync.Mutex) error {
		mine, err := askUntil(t, until)
		mu.Lock()
		took = append(took, mine...)
		mu.Unlock()
		return err
	})
	if err == nil && len(took) == 0 {
		err = errors.New("no request was answered in time")
	}
	if err != nil {
		return requests{}, fmt.Errorf("%s %s from %s: %w", t.method, t.path, t.addr, err)
	}
	elapsed := time.Since(start)
	slices.Sort(took)
	return requests{
		count:     len(took),
		perSecond: float64(len(took)) / elapsed.Seconds(),
		p50:       took[len(took)/2],
		p99:       took[len(took)*99/100],
	}, nil
}

func askUntil(t target, until time.Time) (took []time.Duration, err error) {
	conn, err := t.dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	request := t.request()
	head := len(request) - len("\r\n")
	r := bufio.NewReaderSize(conn, 64<<10)
	for start := time.Now(); start.Before(until); start = time.Now() {
		if t.traced {
			request = fmt.Appendf(request[:head], "Traceparent: 00-%016x%016x-%016x-00\r\n\r\n", rand.Uint64(), rand.Uint64(), rand.Uint64())
		}
		if _, err := conn.Write(request); err != nil {
			return took, err
		}
		length, err := readHeader(r)
		if err == nil && t.method != "HEAD" {
			_, err = r.Discard(int(length))
		}
		if err != nil {
			return took, err
		}
		took = append(took, time.Since(start))
	}
	return took, nil
}

// download reads the target's body on so many connections, over and over or
// once each, for the given time at most, and returns how many bytes came and how
// long it took.
func download(t target, connections int, during time.Duration, once bool) (total int64, elapsed time.Duration, err error) {
	start := time.Now()
	until := start.Add(during)
	err = each(connections, func(mu *sync.Mutex) error {
		n, err := downloadUntil(t, until, once)
		mu.Lock()
		total += n
		mu.Unlock()
		return err
	})
	if err != nil {
		err = fmt.Errorf("%s %s from %s: %w", t.method, t.path, t.addr, err)
	}
	return total, time.Since(start), err
}

func downloadUntil(t target, until time.Time, once bool) (total int64, err error) {
	conn, err := t.dial()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(until); err != nil {
		return 0, err
	}
	r := bufio.NewReader(conn)
	discard := discardTLS
	if t.tls == nil {
		discard = discardTCP
	}
	buffer := make([]byte, 1<<20)
	for time.Now().Before(until) {
		if _, err := conn.Write(t.request()); err != nil {
			return total, err
		}
		length, err := readHeader(r)
		if timedOut(err) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		begun := min(int64(r.Buffered()), length)
		if _, err := r.Discard(int(begun)); err != nil {
			return total, err
		}
		n, err := discard(conn, length-begun, buffer)
		total += begun + n
		if timedOut(err) {
			return total, nil
		}
		if err != nil || once {
			return total, err
		}
	}
	return total, nil
}

func timedOut(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func discardTLS(conn net.Conn, n int64, buffer []byte) (read int64, err error) {
	for read < n && err == nil {
		var k int
		k, err = conn.Read(buffer[:min(int64(len(buffer)), n-read)])
		read += int64(k)
	}
	return read, err
}

// discardTCP has the kernel drop n bytes without copying them out (MSG_TRUNC,
// tcp(7)), which would cost more than it costs a good server to send them.
func discardTCP(conn net.Conn, n int64, buffer []byte) (read int64, err error) {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	for read < n {
		var k int
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			k, _, failed = syscall.Recvfrom(int(fd), buffer[:min(int64(len(buffer)), n-read)], syscall.MSG_TRUNC)
			return failed != syscall.EAGAIN
		})
		if err = errors.Join(err, failed); err != nil {
			return read, err
		}
		if k == 0 {
			return read, io.ErrUnexpectedEOF
		}
		read += int64(k)
	}
	return read, nil
}

// each runs do on so many goroutines and joins their errors.
func each(n int, do func(mu *sync.Mutex) error) error {
	var mu sync.Mutex
	var failed []error
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if err := do(&mu); err != nil {
				mu.Lock()
				failed = append(failed, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(failed) == 0 {
		return nil
	}
	return failed[0] // the others will say the same
}

var contentLength = []byte("content-length:")

// readHeader reads the header of an answer of status 200, and returns how long
// its body is.
func readHeader(r *bufio.Reader) (length int64, err error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return 0, err
	}
	if !bytes.HasPrefix(line, []byte("HTTP/1.1 200 ")) {
		return 0, fmt.Errorf("answered %q", bytes.TrimSpace(line))
	}
	length = -1
	for {
		if line, err = r.ReadSlice('\n'); err != nil {
			return 0, err
		}
		if len(line) <= 2 {
			break
		}
		if len(line) > len(contentLength) && bytes.EqualFold(line[:len(contentLength)], contentLength) {
			if length, err = strconv.ParseInt(string(bytes.TrimSpace(line[len(contentLength):])), 10, 64); err != nil {
				return 0, err
			}
		}
	}
	if length <= 0 {
		return 0, fmt.Errorf("the answer has a body of %d bytes", length)
	}
	return length, nil
}
