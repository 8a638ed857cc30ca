//! Runs the check named by the variable `TARGET` under libFuzzer.

#![no_main]

mod checks;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

static CHECK: LazyLock<checks::Check> =
    LazyLock::new(|| checks::find(&std::env::var("TARGET").unwrap_or_default()));

fuzz_target!(|input: &[u8]| CHECK(input));
