//! One target under libFuzzer: the variable `TARGET` names it.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rds_task_facade::fuzz::{Check, TARGETS};

static CHECK: LazyLock<Check> = LazyLock::new(|| {
    let wanted = std::env::var("TARGET").unwrap_or_default();
    let found = TARGETS.into_iter().find(|(name, _)| *name == wanted);
    found.expect("TARGET names one of fuzz::TARGETS").1
});

fuzz_target!(|input: &[u8]| CHECK(input));
