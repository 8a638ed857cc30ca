package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/net/dns/dnsmessage"
)

// upstreamName is the name of the upstream for programs whose resolver is a nameServer.
const upstreamName = "upstream.crowd.test"

// nameServer replies to every query for IPv4 addresses with 127.0.0.1, until it is silenced.
type nameServer struct {
	socket net.PacketConn
	silent atomic.Bool
	// Queries without a reply.
	ignored atomic.Int64
}

// startNameServer listens on port 53 of a random loopback address, because resolv.conf cannot hold another port.
func startNameServer() (*nameServer, error) {
	address := fmt.Sprintf("127.%d.%d.%d:53", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
	socket, err := net.ListenPacket("udp", address)
	if err != nil {
		return nil, err
	}
	server := &nameServer{socket: socket}
	go server.serve()
	return server, nil
}

func (s *nameServer) close() { _ = s.socket.Close() }

func (s *nameServer) serve() {
	buffer := make([]byte, 1500)
	for {
		length, client, err := s.socket.ReadFrom(buffer)
		if err != nil {
			return
		}
		var message dnsmessage.Message
		if message.Unpack(buffer[:length]) != nil || len(message.Questions) != 1 {
			continue
		}
		if s.silent.Load() {
			s.ignored.Add(1)
			continue
		}
		question := message.Questions[0]
		message.Header = dnsmessage.Header{ID: message.ID, Response: true, RecursionAvailable: true}
		message.Additionals = nil
		if question.Type == dnsmessage.TypeA {
			message.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: question.Name, Class: dnsmessage.ClassINET},
				Body:   &dnsmessage.AResource{A: [4]byte{127, 0, 0, 1}},
			}}
		}
		if reply, err := message.Pack(); err == nil {
			_, _ = s.socket.WriteTo(reply, client)
		}
	}
}

// writeConfiguration writes the resolv.conf of a program that uses this server to the folder.
func (s *nameServer) writeConfiguration(folder string) error {
	host, _, err := net.SplitHostPort(s.socket.LocalAddr().String())
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, "resolv.conf"), []byte("nameserver "+host+"\n"), 0o644)
}
