//! Compiles the proto into code and into the descriptor set that reflection serves. Needs no system protoc.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["huaweicloud/rds/task/v1/task_service.proto"], ["proto"])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    // The client is for `call` and `health`, the server for the tests of the client: the program's own server decodes and encodes
    // messages itself (src/server/message.rs).
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
