//! The methods that the server knows, in one table. Routing, metrics, access log and traces all read it, so a new method is one
//! row. The list is closed: a caller cannot add a label value or a name to the log.

/// A method, or [`Method::Other`] for every path that is not in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `TaskService/GetTaskDetail`.
    GetTaskDetail,
    /// `grpc.health.v1.Health/Check`.
    HealthCheck,
    /// `grpc.health.v1.Health/Watch`.
    HealthWatch,
    /// `ServerReflection/ServerReflectionInfo`, v1 and v1alpha.
    Reflection,
    /// Any other path.
    Other,
}

/// What kind of call a method is, as the label `grpc_type` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One request, one reply.
    Unary,
    /// One request, a stream of replies.
    ServerStream,
    /// Two streams.
    BidiStream,
    /// Unknown.
    Other,
}

impl Kind {
    /// The value of the label `grpc_type`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unary => "unary",
            Self::ServerStream => "server_stream",
            Self::BidiStream => "bidi_stream",
            Self::Other => "other",
        }
    }
}

/// One row of the table.
struct Row {
    method: Method,
    kind: Kind,
    service: &'static str,
    name: &'static str,
    /// Service and name, as log and traces show them; with a slash in front it is the path.
    full_name: &'static str,
}

const fn row(
    method: Method,
    kind: Kind,
    service: &'static str,
    name: &'static str,
    full_name: &'static str,
) -> Row {
    Row {
        method,
        kind,
        service,
        name,
        full_name,
    }
}

/// Indexed by `Method as usize`.
#[rustfmt::skip]
const TABLE: [Row; Method::COUNT] = [
    row(Method::GetTaskDetail, Kind::Unary, TASK_SERVICE, "GetTaskDetail", "huaweicloud.rds.task.v1.TaskService/GetTaskDetail"),
    row(Method::HealthCheck, Kind::Unary, "grpc.health.v1.Health", "Check", "grpc.health.v1.Health/Check"),
    row(Method::HealthWatch, Kind::ServerStream, "grpc.health.v1.Health", "Watch", "grpc.health.v1.Health/Watch"),
    row(Method::Reflection, Kind::BidiStream, "grpc.reflection.v1.ServerReflection", "ServerReflectionInfo", "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
    row(Method::Other, Kind::Other, "other", "other", "other"),
];

/// The full name of the task service.
pub const TASK_SERVICE: &str = "huaweicloud.rds.task.v1.TaskService";

/// The older version of reflection, which many tools still ask for, counts as the newer one.
const REFLECTION_V1ALPHA: &str = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";

impl Method {
    const COUNT: usize = Self::Other as usize + 1;

    /// Every method, in the order of the table.
    pub fn all() -> [Self; Self::COUNT] {
        TABLE.each_ref().map(|row| row.method)
    }

    /// The method that the path of an HTTP/2 request names.
    pub fn from_path(path: &str) -> Self {
        match path.strip_prefix('/') {
            Some(REFLECTION_V1ALPHA) => Self::Reflection,
            Some(full_name) => TABLE
                .iter()
                // Without a slash it names no path.
                .find(|row| row.full_name == full_name && row.method != Self::Other)
                .map_or(Self::Other, |row| row.method),
            None => Self::Other,
        }
    }

    /// Unary or streaming.
    pub fn kind(self) -> Kind {
        self.row().kind
    }

    /// The label `grpc_service`.
    pub fn service(self) -> &'static str {
        self.row().service
    }

    /// The label `grpc_method`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Service and method as one name; `other` for an unknown method, whatever path the caller sent.
    pub fn full_name(self) -> &'static str {
        self.row().full_name
    }

    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_belongs_to_its_method_and_is_found_by_its_path() {
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(row.method as usize, index, "{}", row.full_name);
            if row.method != Method::Other {
                assert_eq!(row.full_name, format!("{}/{}", row.service, row.name));
            }
            let path = format!("/{}", row.full_name);
            assert_eq!(Method::from_path(&path), row.method, "{path}");
        }
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
