//! The magic instance ids of the sandbox, as docs/sandbox.md documents them.

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scenario {
    /// The `instance_id` in the request.
    pub(crate) instance_id: &'static str,
    /// What the sandbox does. The part after the first colon is the message of the error.
    #[allow(dead_code)] // The unit tests read it.
    pub(crate) behaviour: &'static str,
    /// The facade's status with default limits: `OK`, or `CODE / REASON`.
    pub(crate) outcome: &'static str,
}

/// Every row of the table.
pub(crate) fn documented() -> Vec<Scenario> {
    let page = include_str!("../../docs/sandbox.md");
    let (_, table) = page.split_once("<!-- scenarios -->").expect("a mark");
    let (table, _) = table.split_once("<!-- /scenarios -->").expect("a mark");
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    rows.map(|line| {
        let cells: Vec<_> = line.trim_matches(['|', ' ']).split(" | ").collect();
        let &[instance_id, behaviour, outcome] = &cells[..] else {
            panic!("not three cells: {line}");
        };
        Scenario {
            instance_id: instance_id.trim_matches('`'),
            behaviour,
            outcome,
        }
    })
    .collect()
}
