//! The methods of the server, in one table that routing, metrics, access log and traces read. The list is closed: callers cannot add
//! label values or log field values.

/// A method, or [`Method::Other`] for every path that is not in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `TaskService/GetTaskDetail`.
    GetTaskDetail,
    /// `TaskService/WatchTaskDetail`.
    WatchTaskDetail,
    /// `grpc.health.v1.Health/Check`.
    HealthCheck,
    /// `grpc.health.v1.Health/Watch`.
    HealthWatch,
    /// `ServerReflection/ServerReflectionInfo`, v1 and v1alpha.
    Reflection,
    /// Any other path.
    Other,
}

/// Each method with its kind and its full name: service and method, as log and traces show them. With a leading slash the full name
/// is the path. Indexed by `Method as usize`.
const TABLE: [(Method, &str, &str); Method::COUNT] = [
    (
        Method::GetTaskDetail,
        "unary",
        "huaweicloud.rds.task.v1.TaskService/GetTaskDetail",
    ),
    (
        Method::WatchTaskDetail,
        "server_stream",
        "huaweicloud.rds.task.v1.TaskService/WatchTaskDetail",
    ),
    (Method::HealthCheck, "unary", "grpc.health.v1.Health/Check"),
    (
        Method::HealthWatch,
        "server_stream",
        "grpc.health.v1.Health/Watch",
    ),
    (
        Method::Reflection,
        "bidi_stream",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ),
    (Method::Other, OTHER, OTHER),
];

/// Kind, service and method name of [`Method::Other`].
const OTHER: &str = "other";

/// The full name of the task service.
pub const TASK_SERVICE: &str = "huaweicloud.rds.task.v1.TaskService";

/// The older version of reflection, which many tools still use. It counts as the newer one.
const REFLECTION_V1ALPHA: &str = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";

impl Method {
    const COUNT: usize = Self::Other as usize + 1;

    /// Every method, in the order of the table.
    pub fn all() -> [Self; Self::COUNT] {
        TABLE.map(|(method, ..)| method)
    }

    /// The method that the path of an HTTP/2 request names.
    pub fn from_path(path: &str) -> Self {
        match path.strip_prefix('/') {
            Some(REFLECTION_V1ALPHA) => Self::Reflection,
            Some(requested) => TABLE
                .iter()
                .find(|(_, _, full_name)| *full_name == requested)
                .map_or(Self::Other, |(method, ..)| *method),
            None => Self::Other,
        }
    }

    /// The label `grpc_type`: unary or streaming.
    pub fn kind(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// The label `grpc_service`.
    pub fn service(self) -> &'static str {
        self.full_name()
            .split_once('/')
            .map_or(OTHER, |(service, _)| service)
    }

    /// The label `grpc_method`.
    pub fn name(self) -> &'static str {
        self.full_name()
            .split_once('/')
            .map_or(OTHER, |(_, name)| name)
    }

    /// Service and method as one name; `other` for an unknown method.
    pub fn full_name(self) -> &'static str {
        TABLE[self as usize].2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_at_the_index_of_its_method_and_is_found_by_its_path() {
        for (index, (method, _, full_name)) in TABLE.into_iter().enumerate() {
            assert_eq!(method as usize, index, "{full_name}");
            let path = format!("/{full_name}");
            assert_eq!(Method::from_path(&path), method, "{path}");
        }
        let method = Method::GetTaskDetail;
        assert_eq!(method.service(), TASK_SERVICE);
        assert_eq!(method.name(), "GetTaskDetail");
        assert_eq!(
            (Method::Other.service(), Method::Other.name()),
            (OTHER, OTHER)
        );
    }

    #[test]
    fn unknown_paths_are_other_and_v1alpha_is_reflection() {
        for path in ["", "/", "/other", "other", "/grpc.health.v1.Health", "/x/y"] {
            assert_eq!(Method::from_path(path), Method::Other, "{path}");
        }
        let v1alpha = format!("/{REFLECTION_V1ALPHA}");
        assert_eq!(Method::from_path(&v1alpha), Method::Reflection);
    }
}
