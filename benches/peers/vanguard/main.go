// The second peer of docs/performance.md: only transcodes gRPC to the REST call of RDS and back, with vanguard-go. Configured
// for speed, like the first peer: no log, no limits, connection reuse. `go generate && go build` builds it; this needs buf on
// the PATH.
package main

import (
	"flag"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"

	"connectrpc.com/vanguard"
	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/protobuf/encoding/protojson"

	taskv1 "rds-task-facade/benches/peers/vanguard/gen/huaweicloud/rds/task/v1"
)

//go:generate buf generate

// The proto carries no google.api.http annotations. A body of "*" repeats the ids of the path; no rule leaves them out.
var rule = &annotations.HttpRule{
	Selector: "huaweicloud.rds.task.v1.TaskService.GetTaskDetail",
	Pattern:  &annotations.HttpRule_Post{Post: "/v3/{project_id}/instances/{instance_id}/task-center-detail"},
	Body:     "*",
}

func main() {
	log.SetFlags(0)
	listen := flag.String("listen", "127.0.0.1:5052", "gRPC address, without TLS")
	upstream := flag.String("upstream", "http://127.0.0.1:9000", "base URL of the REST upstream")
	flag.Parse()

	base, err := url.Parse(*upstream)
	if err != nil {
		log.Fatal(err)
	}
	service := vanguard.NewServiceWithSchema(
		taskv1.File_huaweicloud_rds_task_v1_task_service_proto.Services().ByName("TaskService"),
		forwardTo(base),
		vanguard.WithTargetProtocols(vanguard.ProtocolREST),
		vanguard.WithNoTargetCompression(),
	)
	transcoder, err := vanguard.NewTranscoder([]*vanguard.Service{service}, vanguard.WithRules(rule), vanguard.WithCodec(protoNames))
	if err != nil {
		log.Fatal(err)
	}

	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Addr:      *listen,
		Handler:   transcoder,
		Protocols: &protocols,
		// As many as the first peer allows; Go's default is 250.
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 1024},
	}
	log.Fatal(server.ListenAndServe())
}

// forwardTo forwards requests to the upstream and reuses connections; the default is two idle connections.
func forwardTo(base *url.URL) http.Handler {
	return &httputil.ReverseProxy{
		Rewrite:    func(request *httputil.ProxyRequest) { request.SetURL(base) },
		Transport:  &http.Transport{MaxIdleConnsPerHost: 4096, DisableCompression: true},
		BufferPool: &buffers{sync.Pool{New: func() any { return make([]byte, 32<<10) }}},
	}
}

// protoNames writes fields as RDS expects them, `workflow_id` instead of `workflowId`, and omits unset fields.
func protoNames(resolver vanguard.TypeResolver) vanguard.Codec {
	return &vanguard.JSONCodec{
		MarshalOptions:   protojson.MarshalOptions{Resolver: resolver, UseProtoNames: true},
		UnmarshalOptions: protojson.UnmarshalOptions{Resolver: resolver, DiscardUnknown: true},
	}
}

// buffers are reused to copy responses; otherwise each response allocates 32 KiB.
type buffers struct{ pool sync.Pool }

func (buffers *buffers) Get() []byte       { return buffers.pool.Get().([]byte) }
func (buffers *buffers) Put(buffer []byte) { buffers.pool.Put(buffer) }
