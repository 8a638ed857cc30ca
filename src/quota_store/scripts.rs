//! The scripts that the server runs. They use commands of Redis 6.2, and every entry that they write expires.

use std::sync::LazyLock;

use futures_util::future::try_join_all;
use redis::{RedisResult, Script, aio::MultiplexedConnection};

pub(super) static SCRIPTS: LazyLock<Scripts> = LazyLock::new(|| {
    let slots = include_str!("scripts/slots.lua");
    let with_slots = |script| Script::new(&[slots, script].concat());
    Scripts {
        admit: with_slots(include_str!("scripts/admit.lua")),
        poll: with_slots(include_str!("scripts/poll.lua")),
        share: Script::new(include_str!("scripts/share.lua")),
        publish: Script::new(include_str!("scripts/publish.lua")),
        renew: Script::new(include_str!("scripts/renew.lua")),
        throttle: Script::new(include_str!("scripts/throttle.lua")),
        rejected: Script::new(include_str!("scripts/rejected.lua")),
        accepted: Script::new(include_str!("scripts/accepted.lua")),
        heartbeat: Script::new(include_str!("scripts/heartbeat.lua")),
        remove: Script::new(include_str!("scripts/remove.lua")),
    }
});

pub(super) struct Scripts {
    pub(super) admit: Script,
    pub(super) poll: Script,
    pub(super) share: Script,
    pub(super) publish: Script,
    pub(super) renew: Script,
    pub(super) throttle: Script,
    pub(super) rejected: Script,
    pub(super) accepted: Script,
    pub(super) heartbeat: Script,
    pub(super) remove: Script,
}

impl Scripts {
    /// Sends all scripts to the server, so that no call has to. One that the server loses is sent again when it is needed.
    pub(super) async fn load(&self, connection: &MultiplexedConnection) -> RedisResult<()> {
        let scripts = [
            &self.admit,
            &self.poll,
            &self.share,
            &self.publish,
            &self.renew,
            &self.throttle,
            &self.rejected,
            &self.accepted,
            &self.heartbeat,
            &self.remove,
        ];
        let load = async |script: &Script| script.load_async(&mut connection.clone()).await;
        try_join_all(scripts.map(load)).await.map(drop)
    }
}
