//! Which RPC a call is, out of a closed list: no caller can add a label value or a name to the log.

/// The RPCs that are told apart; everything else is one label value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `TaskService/GetTaskDetail`.
    GetTaskDetail,
    /// `grpc.health.v1.Health`, `Check`.
    HealthCheck,
    /// `grpc.health.v1.Health`, `Watch`.
    HealthWatch,
    /// `ServerReflection/ServerReflectionInfo`, v1 and v1alpha.
    Reflection,
    /// Any other path.
    Other,
}

impl Method {
    pub(super) const ALL: [Self; 5] = [
        Self::GetTaskDetail,
        Self::HealthCheck,
        Self::HealthWatch,
        Self::Reflection,
        Self::Other,
    ];

    /// Which RPC the path of an HTTP/2 request names.
    pub fn of_path(path: &str) -> Self {
        match path {
            "/huaweicloud.rds.task.v1.TaskService/GetTaskDetail" => Self::GetTaskDetail,
            "/grpc.health.v1.Health/Check" => Self::HealthCheck,
            "/grpc.health.v1.Health/Watch" => Self::HealthWatch,
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
            | "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo" => Self::Reflection,
            _ => Self::Other,
        }
    }

    /// The labels `grpc_type`, `grpc_service` and `grpc_method`.
    pub(super) fn labels(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::GetTaskDetail => (
                "unary",
                "huaweicloud.rds.task.v1.TaskService",
                "GetTaskDetail",
            ),
            Self::HealthCheck => ("unary", "grpc.health.v1.Health", "Check"),
            Self::HealthWatch => ("server_stream", "grpc.health.v1.Health", "Watch"),
            Self::Reflection => (
                "bidi_stream",
                "grpc.reflection.v1.ServerReflection",
                "ServerReflectionInfo",
            ),
            Self::Other => ("other", "other", "other"),
        }
    }

    /// Service and method as one name for the access line; `other` for an unknown one, whatever the caller sent.
    pub fn name(self) -> &'static str {
        match self {
            Self::GetTaskDetail => "huaweicloud.rds.task.v1.TaskService/GetTaskDetail",
            Self::HealthCheck => "grpc.health.v1.Health/Check",
            Self::HealthWatch => "grpc.health.v1.Health/Watch",
            Self::Reflection => "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            Self::Other => "other",
        }
    }
}
