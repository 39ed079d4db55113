package storage

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"time"
)

// mark says what is there of a chunk.
type mark struct {
	n     int64  // bytes, from the beginning of the chunk
	sum   uint32 // their CRC-32C
	saved int64  // how many of them the state file tells of
	when  time.Time
}

// maxChunks bounds what the size that a manifest claims can make us remember.
const maxChunks = 1 << 16

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// The state file is a head (magic, size, chunk, CRC-32C of these) and one record
// for each chunk (n, sum, CRC-32C of these), big endian; sizes that keep each
// record within one sector.
const (
	stateMagic = "CRpart01"
	headSize   = 32
	recordSize = 16
)

func (p *Partial) head() []byte {
	b := make([]byte, headSize)
	copy(b, stateMagic)
	binary.BigEndian.PutUint64(b[8:], uint64(p.size))
	binary.BigEndian.PutUint64(b[16:], uint64(p.chunk))
	binary.BigEndian.PutUint32(b[24:], crc32.Checksum(b[:24], castagnoli))
	return b
}

// recall finds out what is there from before.
func (p *Partial) recall() error {
	state, err := io.ReadAll(io.LimitReader(p.state, headSize+(maxChunks+1)*recordSize))
	if err != nil {
		return err
	}
	if len(state) >= headSize {
		// The chunks are those that it was begun with.
		chunk := p.chunk
		p.chunk = int64(binary.BigEndian.Uint64(state[16:]))
		if p.chunk < 1 || p.size/p.chunk >= maxChunks || string(p.head()) != string(state[:headSize]) {
			p.chunk, state = chunk, nil
		}
	}
	p.marks = make([]mark, (p.size+p.chunk-1)/p.chunk)
	if len(state) < headSize {
		if err := errors.Join(p.state.Truncate(0), p.data.Truncate(0)); err != nil {
			return err
		}
		_, err := p.state.WriteAt(p.head(), 0)
		return err
	}
	records := state[headSize:]
	buf := make([]byte, bufferSize)
	for i := range p.marks {
		if len(records) < recordSize {
			break
		}
		n, sum := int64(binary.BigEndian.Uint64(records)), binary.BigEndian.Uint32(records[8:])
		right := crc32.Checksum(records[:12], castagnoli) == binary.BigEndian.Uint32(records[12:])
		records = records[recordSize:]
		if right && n > 0 && n <= p.length(i) && p.checksum(i, n, buf) == sum {
			p.marks[i] = mark{n: n, sum: sum, saved: n}
		}
	}
	return nil
}

func (p *Partial) save(chunk int, m mark) error {
	var record [recordSize]byte
	binary.BigEndian.PutUint64(record[:], uint64(m.n))
	binary.BigEndian.PutUint32(record[8:], m.sum)
	binary.BigEndian.PutUint32(record[12:], crc32.Checksum(record[:12], castagnoli))
	_, err := p.state.WriteAt(record[:], headSize+int64(chunk)*recordSize)
	return err
}

// checksum is that of the first n bytes of a chunk; of fewer if they cannot be
// read, which is as good as wrong.
func (p *Partial) checksum(chunk int, n int64, buf []byte) (sum uint32) {
	r := io.NewSectionReader(p.data, int64(chunk)*p.chunk, n)
	for {
		m, err := r.Read(buf)
		sum = crc32.Update(sum, castagnoli, buf[:m])
		if err != nil {
			return sum
		}
	}
}
