//! Generates the client from the proto, and its descriptors for the output as JSON.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const PROTO_FOLDER: &str = "../../../proto";
    println!("cargo::rerun-if-changed={PROTO_FOLDER}");
    let descriptors = protox::compile(
        ["huaweicloud/rds/task/v1/task_service.proto"],
        [PROTO_FOLDER],
    )?;
    let path = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(path, descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)?;
    Ok(())
}
