package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// peer is a connection whose frames are made by hand, for what no client library does.
type peer struct {
	socket  net.Conn
	writer  *bufio.Writer
	framer  *http2.Framer
	encoder *hpack.Encoder
	block   bytes.Buffer
	seen    *seen
	// Closed when the other side has closed.
	closed chan struct{}
}

// seen is what the other side has sent.
type seen struct {
	lock         sync.Mutex
	acknowledged int // PINGs and SETTINGS.
	windows      int // Of the connection, beyond the one that each begins with.
	goAway       *http2.ErrCode
	// How each stream ended first: `grpc-status`, `:status` of what is no success, or the code of its reset.
	ended map[uint32]string
	over  bool
	more  sync.Cond
}

func (f *facade) open(settings ...http2.Setting) (*peer, error) {
	socket, err := net.Dial("tcp", f.address)
	if err != nil {
		return nil, err
	}
	peer := &peer{socket: socket, writer: bufio.NewWriterSize(socket, 1<<16), closed: make(chan struct{}),
		seen: &seen{ended: map[uint32]string{}}}
	peer.seen.more.L = &peer.seen.lock
	peer.framer = http2.NewFramer(peer.writer, bufio.NewReader(socket))
	// What is wrong is the point.
	peer.framer.AllowIllegalWrites = true
	peer.encoder = hpack.NewEncoder(&peer.block)
	_, _ = peer.writer.WriteString(http2.ClientPreface)
	_ = peer.framer.WriteSettings(settings...)
	return peer, peer.writer.Flush()
}

// read takes in what the other side sends until it closes, and acknowledges nothing.
func (p *peer) read() {
	p.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	go func() {
		defer close(p.closed)
		for {
			frame, err := p.framer.ReadFrame()
			if err != nil {
				var stream http2.StreamError
				if errors.As(err, &stream) {
					continue
				}
				p.seen.lock.Lock()
				p.seen.over = true
				p.seen.more.Broadcast()
				p.seen.lock.Unlock()
				return
			}
			p.seen.note(frame)
		}
	}()
}

func (s *seen) note(frame http2.Frame) {
	s.lock.Lock()
	defer s.lock.Unlock()
	switch frame := frame.(type) {
	case *http2.PingFrame:
		if frame.IsAck() {
			s.acknowledged++
		}
	case *http2.SettingsFrame:
		if frame.IsAck() {
			s.acknowledged++
		}
	case *http2.WindowUpdateFrame:
		s.windows++
	case *http2.RSTStreamFrame:
		// Without an error it follows an answer that did not wait for the whole request.
		if frame.ErrCode != http2.ErrCodeNo {
			s.end(frame, "reset "+frame.ErrCode.String())
		}
	case *http2.GoAwayFrame:
		code := frame.ErrCode
		s.goAway = &code
	case *http2.MetaHeadersFrame:
		for _, field := range frame.RegularFields() {
			if field.Name == "grpc-status" {
				s.end(frame, "gRPC "+field.Value)
			}
		}
		if status := frame.PseudoValue("status"); status != "" && status != "200" {
			s.end(frame, "HTTP "+status)
		}
	}
	s.more.Broadcast()
}

func (s *seen) end(frame http2.Frame, how string) {
	stream := frame.Header().StreamID
	if _, ended := s.ended[stream]; !ended {
		s.ended[stream] = how
	}
}

// ends waits for the other side to close, and gives the code of its GOAWAY.
func (p *peer) ends(limit time.Duration) (http2.ErrCode, error) {
	select {
	case <-p.closed:
	case <-time.After(limit):
		return 0, fmt.Errorf("not closed within %v", limit)
	}
	p.seen.lock.Lock()
	defer p.seen.lock.Unlock()
	if p.seen.goAway == nil {
		return http2.ErrCodeNo, nil
	}
	return *p.seen.goAway, nil
}

// awaitWindow waits for the connection's own window, which is larger than the one that each begins with.
func (p *peer) awaitWindow() {
	p.seen.lock.Lock()
	defer p.seen.lock.Unlock()
	for p.seen.windows == 0 && !p.seen.over {
		p.seen.more.Wait()
	}
}

func (p *peer) close() { _ = p.socket.Close() }

// pairs are the fields of a proper call; later ones replace earlier ones of the same name.
func pairs(more ...[2]string) [][2]string {
	fields := [][2]string{{":method", "POST"}, {":scheme", "http"}, {":authority", "facade"}, {":path", method},
		{"content-type", "application/grpc"}, {"te", "trailers"}, {"x-auth-token", token}}
	for _, field := range more {
		replaced := false
		for index := range fields {
			if fields[index][0] == field[0] {
				fields[index], replaced = field, true
			}
		}
		if !replaced {
			fields = append(fields, field)
		}
	}
	return fields
}

func (p *peer) encode(fields [][2]string) []byte {
	p.block.Reset()
	for _, field := range fields {
		_ = p.encoder.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
	}
	return p.block.Bytes()
}

// headers begins a call, in as many frames as it takes.
func (p *peer) headers(stream uint32, fields [][2]string, endStream bool) {
	block := p.encode(fields)
	first := block[:min(len(block), 16<<10)]
	_ = p.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: first, EndStream: endStream,
		EndHeaders: len(first) == len(block)})
	for rest := block[len(first):]; len(rest) > 0; {
		piece := rest[:min(len(rest), 16<<10)]
		rest = rest[len(piece):]
		_ = p.framer.WriteContinuation(stream, len(rest) == 0, piece)
	}
}

// ask makes a whole call.
func (p *peer) ask(stream uint32, fields [][2]string, asked taskRequest) {
	p.headers(stream, fields, false)
	_ = p.framer.WriteData(stream, true, framed(asked.encoded()))
}

// data goes on with a call's body, in frames as large as everybody takes them.
func (p *peer) data(stream uint32, bytes []byte) {
	for rest := bytes; len(rest) > 0; {
		piece := rest[:min(len(rest), 16<<10)]
		rest = rest[len(piece):]
		_ = p.framer.WriteData(stream, false, piece)
	}
}

// framed is the message with gRPC's prefix.
func framed(message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
}

// streamID is the id of a connection's call, counted from zero.
func streamID(number int) uint32 { return uint32(2*number + 1) }

// outcomes waits until so many streams have ended, and counts how. When the connection ends before, the rest have ended
// with it.
func (p *peer) outcomes(streams int, limit time.Duration) map[string]int {
	timer := time.AfterFunc(limit, p.close)
	p.seen.lock.Lock()
	defer p.seen.lock.Unlock()
	for len(p.seen.ended) < streams && !p.seen.over {
		p.seen.more.Wait()
	}
	counts := map[string]int{}
	for _, how := range p.seen.ended {
		counts[how]++
	}
	if rest := streams - len(p.seen.ended); rest > 0 {
		switch {
		case !timer.Stop():
			counts["nothing"] = rest
		case p.seen.goAway == nil:
			counts["closed"] = rest
		default:
			counts["closed "+p.seen.goAway.String()] = rest
		}
	}
	return counts
}
