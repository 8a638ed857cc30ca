//! A call without a gRPC library, for requests and deadlines that a library would not let out.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use prost::Message as _;
use rds_task_facade::pb::{GetTaskDetailRequest, GetTaskDetailResponse};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tonic::Status;

use super::{PATIENCE, within};

pub(crate) const PATH: &str = "/huaweicloud.rds.task.v1.TaskService/GetTaskDetail";

/// An HTTP/2 connection; its streams are calls.
#[derive(Clone)]
pub(crate) struct Connection(h2::client::SendRequest<Bytes>);

/// What came back on one stream.
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) http_status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) data: Vec<u8>,
    pub(crate) trailers: HeaderMap,
}

impl Raw {
    /// The status of the call, from headers or trailers; `None` if absent.
    pub(crate) fn status(&self) -> Option<Status> {
        Status::from_header_map(&self.trailers).or_else(|| Status::from_header_map(&self.headers))
    }

    /// The reply of a call that succeeded.
    pub(crate) fn reply(&self) -> GetTaskDetailResponse {
        GetTaskDetailResponse::decode(&self.data[5..]).expect("a reply")
    }
}

/// A message with its gRPC prefix.
pub(crate) fn framed(request: &GetTaskDetailRequest) -> Bytes {
    let message = request.encode_to_vec();
    let length = u32::try_from(message.len()).expect("test messages are short");
    [&[0][..], &length.to_be_bytes(), &message].concat().into()
}

/// The headers of an ordinary gRPC request.
pub(crate) fn headers() -> http::request::Builder {
    Request::post(format!("http://facade{PATH}"))
        .header("te", "trailers")
        .header("content-type", "application/grpc")
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address)
            .await
            .expect("the program listens");
        stream.set_nodelay(true).expect("a TCP option");
        Self::over(stream).await.expect("HTTP/2")
    }

    /// On a stream that is open already.
    pub(crate) async fn over<S>(stream: S) -> Result<Self, h2::Error>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (send, connection) = within("HTTP/2", h2::client::handshake(stream)).await?;
        tokio::spawn(connection);
        Ok(Self(send))
    }

    /// One exchange: the headers of `request`, `body` as it is, and everything that comes back.
    pub(crate) async fn exchange(
        &self,
        request: http::request::Builder,
        body: Bytes,
    ) -> Result<Raw, h2::Error> {
        // A test may wait for another event while its call is in flight.
        tokio::time::timeout(2 * PATIENCE, self.exchanged(request, body))
            .await
            .expect("the reply comes before the end of patience")
    }

    async fn exchanged(
        &self,
        request: http::request::Builder,
        body: Bytes,
    ) -> Result<Raw, h2::Error> {
        let mut send = self.0.clone().ready().await?;
        let request = request.body(()).expect("a request");
        let (reply, mut stream) = send.send_request(request, false)?;
        stream.send_data(body, true)?;
        let (head, mut body) = reply.await?.into_parts();
        let mut data = Vec::new();
        while let Some(piece) = body.data().await {
            let piece = piece?;
            body.flow_control().release_capacity(piece.len())?;
            data.extend_from_slice(&piece);
        }
        let trailers = body.trailers().await?.unwrap_or_default();
        Ok(Raw {
            http_status: head.status,
            headers: head.headers,
            data,
            trailers,
        })
    }

    /// A call with a `grpc-timeout` that only the server sees.
    pub(crate) async fn call_within(
        &self,
        grpc_timeout: &str,
        request: &GetTaskDetailRequest,
    ) -> Result<Raw, h2::Error> {
        self.exchange(
            headers().header("grpc-timeout", grpc_timeout),
            framed(request),
        )
        .await
    }
}
