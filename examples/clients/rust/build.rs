//! Generates the client from the proto.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const PROTO_FOLDER: &str = "../../../proto";
    println!("cargo::rerun-if-changed={PROTO_FOLDER}");
    let descriptors = protox::compile(
        ["huaweicloud/rds/task/v1/task_service.proto"],
        [PROTO_FOLDER],
    )?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)?;
    Ok(())
}
