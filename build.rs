//! Compiles the proto into code and into the descriptor set that reflection serves. Needs no system protoc. Tells the linker
//! what belongs together in a release.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["huaweicloud/rds/task/v1/task_service.proto"], ["proto"])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .codec_path("crate::rpc::Codec")
        .compile_fds(descriptors)?;
    order_functions();
    Ok(())
}

/// The functions of a call's path lie side by side: `link-order.ld`, a script for lld and GNU ld. Another linker may refuse
/// it; then leave this out, nothing else depends on it.
fn order_functions() {
    println!("cargo::rerun-if-changed=link-order.ld");
    let is = |variable, value| env::var_os(variable).is_some_and(|set| set == value);
    if is("PROFILE", "release") && is("CARGO_CFG_TARGET_OS", "linux") {
        let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
        let script = root.join("link-order.ld");
        println!("cargo::rustc-link-arg-bins=-T{}", script.display());
    }
}
