//! Compiles the protos without a system protoc: the task service, with the descriptor set for reflection, and the OTLP messages for
//! trace export.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=third_party");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);

    let service = protox::compile(["huaweicloud/rds/task/v1/task_service.proto"], ["proto"])?;
    fs::write(out.join("descriptors.bin"), service.encode_to_vec())?;
    // `call` prints the reply as JSON: proto names, without unset optional fields and empty lists; src/pb.rs has the JSON form of states
    // and times.
    // `call` uses the generated client, and its tests use the generated server. The program's server decodes and encodes messages
    // itself (src/server/message.rs).
    let mut builder = tonic_prost_build::configure()
        .message_attribute(".", "#[derive(serde::Serialize)]")
        .field_attribute(
            "sub_task_list",
            r#"#[serde(skip_serializing_if = "Vec::is_empty")]"#,
        );
    for message in service.file.iter().flat_map(|file| &file.message_type) {
        for field in &message.field {
            let path = format!("{}.{}", message.name(), field.name());
            if field.proto3_optional()
                || field.r#type() == Type::Message && field.label() == Label::Optional
            {
                let attribute = r#"#[serde(skip_serializing_if = "Option::is_none")]"#;
                builder = builder.field_attribute(&path, attribute);
            }
            let attribute = match field.type_name() {
                ".google.protobuf.Timestamp" => r#"#[serde(serialize_with = "serialize_time")]"#,
                ".huaweicloud.rds.task.v1.TaskState" => {
                    r#"#[serde(serialize_with = "serialize_state", skip_serializing_if = "is_unspecified")]"#
                }
                _ => continue,
            };
            builder = builder.field_attribute(&path, attribute);
        }
    }
    builder.compile_fds(service)?;

    let otlp = protox::compile(
        ["opentelemetry/proto/collector/trace/v1/trace_service.proto"],
        ["third_party/opentelemetry-proto"],
    )?;
    // Without comments, because their indented lines would become doctests.
    tonic_prost_build::Config::new()
        .disable_comments(["."])
        .include_file("otlp.rs")
        .compile_fds(otlp)?;
    Ok(())
}
