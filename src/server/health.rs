//! The standard health service, the state behind it, and reflection.

use std::convert::Infallible;

use tokio::sync::watch;
use tonic::service::{Routes, RoutesBuilder};
use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};

use crate::{method::TASK_SERVICE, pb::DESCRIPTORS};

/// The service names that health checks accept: the whole server, and the task service.
const NAMES: [&str; 2] = ["", TASK_SERVICE];

/// The longest request, in bytes: a name of a service, file or symbol.
const MAX_REQUEST_BYTES: usize = 4 * 1024;

/// Whether the server accepts calls, as health and `/readyz` report it. It never follows the health of RDS: otherwise all replicas
/// would become unready at once.
#[derive(Debug)]
pub(super) struct HealthState {
    reporter: HealthReporter,
    serving: watch::Sender<bool>,
}

impl HealthState {
    /// Starts with `NOT_SERVING`; `serving` always holds the status.
    pub(super) async fn new(serving: watch::Sender<bool>) -> Self {
        let health = Self {
            reporter: HealthReporter::new(),
            serving,
        };
        health.set(false).await;
        health
    }

    /// Sets SERVING or `NOT_SERVING`.
    pub(super) async fn set(&self, serving: bool) {
        let status = if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for name in NAMES {
            self.reporter.set_service_status(name, status).await;
        }
        self.serving.send_replace(serving);
    }

    /// Follows `ready` until it is dropped.
    pub(super) async fn follow(&self, mut ready: watch::Receiver<bool>) -> Infallible {
        while ready.changed().await.is_ok() {
            let ready = *ready.borrow_and_update();
            self.set(ready).await;
        }
        // The sender is gone: it never changes again.
        std::future::pending().await
    }

    /// Ends all open `Watch` streams, which would keep their connections alive; `Check` still returns `NOT_SERVING`.
    pub(super) async fn end_watches(&self) {
        for name in NAMES {
            self.reporter.clone().clear_service_status(name).await;
        }
        self.set(false).await;
    }

    /// The auxiliary services: health and, if `reflection` is set, reflection.
    pub(super) fn routes(&self, reflection: bool) -> Routes {
        let health = HealthService::from_health_reporter(self.reporter.clone());
        let mut routes = RoutesBuilder::default();
        routes.add_service(HealthServer::new(health).max_decoding_message_size(MAX_REQUEST_BYTES));
        if reflection {
            // Many tools still use v1alpha only. Without the descriptors of google.rpc and health, they show error details as raw
            // bytes and cannot call health.
            routes
                .add_service(
                    descriptors()
                        .build_v1()
                        .expect(COMPILED_IN)
                        .max_decoding_message_size(MAX_REQUEST_BYTES),
                )
                .add_service(
                    descriptors()
                        .build_v1alpha()
                        .expect(COMPILED_IN)
                        .max_decoding_message_size(MAX_REQUEST_BYTES),
                );
        }
        routes.routes().prepare()
    }
}

const COMPILED_IN: &str = "the compiled-in descriptors are valid";

fn descriptors() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .include_reflection_service(false)
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
}
