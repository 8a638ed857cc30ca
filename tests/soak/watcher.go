package main

import (
	"context"
	"errors"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
)

const watchMethod = "/huaweicloud.rds.task.v1.TaskService/WatchTaskDetail"

// watchRequest is the request of a watch that resumes after the etag; an empty one begins a new watch.
func watchRequest(task taskRequest, etag string) []byte {
	message := task.encoded()
	if etag != "" {
		message = protowire.AppendTag(message, 5, protowire.BytesType)
		message = protowire.AppendString(message, etag)
	}
	return message
}

// watchMessage is one message of a watch.
type watchMessage struct {
	etag string
	// Absent in a heartbeat.
	hasTask bool
	// The task's name and, if it is the number of a state, that number.
	name  string
	state int
	// The task is Completed.
	over bool
	at   time.Time
}

func parseWatchMessage(encoded []byte) (watchMessage, error) {
	message := watchMessage{state: -1, at: time.Now()}
	for number, value := range fields(encoded) {
		switch number {
		case 1:
			message.hasTask = true
			for number, value := range fields(value) {
				switch number {
				case 4:
					message.name = string(value)
				case 8:
					message.over = string(value) == "Completed"
				}
			}
		case 2:
			message.etag = string(value)
		}
	}
	if state, err := strconv.Atoi(message.name); err == nil {
		message.state = state
	}
	if message.etag == "" {
		return message, errors.New("a message without an etag")
	}
	return message, nil
}

// fields yields the fields of a message that are texts or messages.
func fields(encoded []byte) func(func(protowire.Number, []byte) bool) {
	return func(yield func(protowire.Number, []byte) bool) {
		for len(encoded) > 0 {
			number, kind, size := protowire.ConsumeTag(encoded)
			if size < 0 {
				return
			}
			encoded = encoded[size:]
			if kind != protowire.BytesType {
				if size = protowire.ConsumeFieldValue(number, kind, encoded); size < 0 {
					return
				}
				encoded = encoded[size:]
				continue
			}
			value, size := protowire.ConsumeBytes(encoded)
			if size < 0 || !yield(number, value) {
				return
			}
			encoded = encoded[size:]
		}
	}
}

// watcher is an open watch.
type watcher struct{ stream grpc.ClientStream }

// openWatch starts a watch, which ends with the context. pairs are metadata.
func openWatch(ctx context.Context, connection *grpc.ClientConn, task taskRequest, etag string, pairs []string, options ...grpc.CallOption) (watcher, error) {
	ctx = metadata.AppendToOutgoingContext(ctx, pairs...)
	options = append(options, grpc.ForceCodec(rawCodec{}))
	stream, err := connection.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, watchMethod, options...)
	if err != nil {
		return watcher{}, err
	}
	message := watchRequest(task, etag)
	if err := stream.SendMsg(&message); err != nil {
		return watcher{}, err
	}
	return watcher{stream}, stream.CloseSend()
}

// next waits for the next message. The error is io.EOF when the task is over.
func (w watcher) next() (watchMessage, error) {
	var encoded []byte
	if err := w.stream.RecvMsg(&encoded); err != nil {
		return watchMessage{}, err
	}
	return parseWatchMessage(encoded)
}
