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

// peer is an HTTP/2 client connection that writes single frames, also those that no client library sends.
type peer struct {
	socket   net.Conn
	writer   *bufio.Writer
	framer   *http2.Framer
	encoder  *hpack.Encoder
	block    bytes.Buffer
	received *received
	// Gets each DATA frame, if set before `read`.
	onData func(*http2.DataFrame)
	// Whether PINGs are acknowledged.
	acknowledges bool
	// Closed when the server has closed the connection.
	closed chan struct{}
}

// received is what the server has sent.
type received struct {
	lock         sync.Mutex
	acknowledged int // PINGs and SETTINGS.
	windows      int // WINDOW_UPDATE frames.
	goAway       *http2.ErrCode
	// First end of each stream: its `grpc-status`, an HTTP status other than 200, or the code of its reset.
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
		received: &received{ended: map[uint32]string{}}}
	peer.received.more.L = &peer.received.lock
	peer.framer = http2.NewFramer(peer.writer, bufio.NewReader(socket))
	// Attacks send illegal frames on purpose.
	peer.framer.AllowIllegalWrites = true
	peer.encoder = hpack.NewEncoder(&peer.block)
	_, _ = peer.writer.WriteString(http2.ClientPreface)
	_ = peer.framer.WriteSettings(settings...)
	return peer, peer.writer.Flush()
}

// pong encodes the acknowledgement of a PING (RFC 9113, section 6.7).
func pong(data [8]byte) []byte {
	return append([]byte{0, 0, 8, byte(http2.FramePing), byte(http2.FlagPingAck), 0, 0, 0, 0}, data[:]...)
}

// read records the server's frames until the connection ends. It acknowledges none, except PINGs if asked to.
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
				p.received.lock.Lock()
				p.received.over = true
				p.received.more.Broadcast()
				p.received.lock.Unlock()
				return
			}
			if data, ok := frame.(*http2.DataFrame); ok && p.onData != nil {
				p.onData(data)
			}
			if ping, ok := frame.(*http2.PingFrame); ok && p.acknowledges && !ping.IsAck() {
				// In one piece, past the writer, which another goroutine may use.
				_, _ = p.socket.Write(pong(ping.Data))
			}
			p.received.note(frame)
		}
	}()
}

func (r *received) note(frame http2.Frame) {
	r.lock.Lock()
	defer r.lock.Unlock()
	switch frame := frame.(type) {
	case *http2.PingFrame:
		if frame.IsAck() {
			r.acknowledged++
		}
	case *http2.SettingsFrame:
		if frame.IsAck() {
			r.acknowledged++
		}
	case *http2.WindowUpdateFrame:
		r.windows++
	case *http2.RSTStreamFrame:
		// NO_ERROR follows a reply that was sent before the end of the request.
		if frame.ErrCode != http2.ErrCodeNo {
			r.end(frame, "reset "+frame.ErrCode.String())
		}
	case *http2.GoAwayFrame:
		code := frame.ErrCode
		r.goAway = &code
	case *http2.MetaHeadersFrame:
		for _, field := range frame.RegularFields() {
			if field.Name == "grpc-status" {
				r.end(frame, "gRPC "+field.Value)
			}
		}
		if status := frame.PseudoValue("status"); status != "" && status != "200" {
			r.end(frame, "HTTP "+status)
		}
	}
	r.more.Broadcast()
}

func (r *received) end(frame http2.Frame, how string) {
	stream := frame.Header().StreamID
	if _, ended := r.ended[stream]; !ended {
		r.ended[stream] = how
	}
}

// ends waits until the server closes the connection and returns the code of its GOAWAY, NO_ERROR if there was none.
func (p *peer) ends(limit time.Duration) (http2.ErrCode, error) {
	select {
	case <-p.closed:
	case <-time.After(limit):
		return 0, fmt.Errorf("the server did not close the connection within %v", limit)
	}
	p.received.lock.Lock()
	defer p.received.lock.Unlock()
	if p.received.goAway == nil {
		return http2.ErrCodeNo, nil
	}
	return *p.received.goAway, nil
}

// calmed waits until the server has either closed the connection with ENHANCE_YOUR_CALM or handled all frames so far.
func (p *peer) calmed() (bool, error) {
	// The server acknowledges the settings of the preface and this PING.
	const acknowledgements = 2
	_ = p.framer.WritePing(false, [8]byte{})
	_ = p.writer.Flush()
	timer := time.AfterFunc(startLimit, p.close)
	defer timer.Stop()
	p.received.lock.Lock()
	defer p.received.lock.Unlock()
	for p.received.acknowledged < acknowledgements && !p.received.over {
		p.received.more.Wait()
	}
	if p.received.acknowledged == acknowledgements {
		return false, nil
	}
	if code := p.received.goAway; code == nil || *code != http2.ErrCodeEnhanceYourCalm {
		return false, errors.New("the server neither closed the connection with ENHANCE_YOUR_CALM nor acknowledged a PING")
	}
	return true, nil
}

// awaitWindow waits until the server has enlarged the connection's flow-control window.
func (p *peer) awaitWindow() {
	p.received.lock.Lock()
	defer p.received.lock.Unlock()
	for p.received.windows == 0 && !p.received.over {
		p.received.more.Wait()
	}
}

func (p *peer) close() { _ = p.socket.Close() }

// pairs returns the header fields of a valid call. Fields in more replace those of the same name.
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

// headers starts a call with a HEADERS frame and as many CONTINUATION frames as needed.
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

// call sends a complete call.
func (p *peer) call(stream uint32, fields [][2]string, request taskRequest) {
	p.headers(stream, fields, false)
	_ = p.framer.WriteData(stream, true, framed(request.encoded()))
}

// data sends a part of a call's body in frames of at most 16 KiB, the default maximum.
func (p *peer) data(stream uint32, bytes []byte) {
	for rest := bytes; len(rest) > 0; {
		piece := rest[:min(len(rest), 16<<10)]
		rest = rest[len(piece):]
		_ = p.framer.WriteData(stream, false, piece)
	}
}

// framed adds gRPC's length prefix to the message.
func framed(message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
}

// streamID is the stream of a connection's call with this number; the first call has number 0.
func streamID(number int) uint32 { return uint32(2*number + 1) }

// outcomes waits until that many streams have ended and counts their ends. When the connection ends first, the other streams
// count as closed; when the limit passes, as "nothing".
func (p *peer) outcomes(streams int, limit time.Duration) map[string]int {
	timer := time.AfterFunc(limit, p.close)
	p.received.lock.Lock()
	defer p.received.lock.Unlock()
	for len(p.received.ended) < streams && !p.received.over {
		p.received.more.Wait()
	}
	counts := map[string]int{}
	for _, how := range p.received.ended {
		counts[how]++
	}
	if rest := streams - len(p.received.ended); rest > 0 {
		switch {
		case !timer.Stop():
			counts["nothing"] = rest
		case p.received.goAway == nil:
			counts["closed"] = rest
		default:
			counts["closed "+p.received.goAway.String()] = rest
		}
	}
	return counts
}
