//! The variables that Slurm's `srun` gives to each task it starts

use super::place::{Place, Source, THIS_MACHINE, Variables, port_of_job};
use super::wrong;
use crate::error::Result;

const RANK: &str = "SLURM_PROCID";
const LOCAL_RANK: &str = "SLURM_LOCALID";
const NODE: &str = "SLURM_NODEID";
const JOB: &str = "SLURM_JOB_ID";
const STEP: &str = "SLURM_STEP_ID";

/// Those of the step first: those of the job may tell of a larger allocation.
const SIZES: [&str; 2] = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"];
const NODE_LISTS: [&str; 2] = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"];

/// Tasks of each node, as `4(x2),3`.
const TASKS: &str = "SLURM_STEP_TASKS_PER_NODE";

/// Tasks of every node, as one number.
const TASKS_OF_EACH: &str = "SLURM_NTASKS_PER_NODE";

/// A batch script has a rank and a number of tasks too, but it is not one of them: `srun` starts steps.
pub(super) fn is_set(variables: &Variables<'_>) -> bool {
    variables.is_set(RANK) && (variables.is_set(STEP) || variables.is_set(SIZES[0]))
}

pub(super) fn place(variables: &Variables<'_>) -> Result<Place> {
    let size = variables.first(&SIZES).unwrap_or(SIZES[0]);
    let world_size = variables.world(size)?;
    let rank = variables.below(RANK, size, world_size)?;
    let (local_size, local_world_size) = local_world_size(variables, size, world_size)?;
    let local_rank = variables.below(LOCAL_RANK, local_size, local_world_size)?;
    let is_one_machine = local_world_size == world_size;
    let address = || {
        if is_one_machine {
            return Ok(Some(THIS_MACHINE.into()));
        }
        let Some(name) = variables.first(&NODE_LISTS) else { return Ok(None) };
        let list = variables.text(name, "a list of nodes")?;
        let expected = "a list of nodes such as node[003-005,9],gpu7";
        first_host(&list).map(Some).ok_or_else(|| wrong(name, format!("`{list}`"), expected))
    };
    let job = variables.get(JOB).and_then(|id| id.trim().parse::<u64>().ok());
    let master =
        if world_size > 1 { Some(variables.master(address, || job.map(port_of_job))?) } else { None };
    let part = |name| variables.get(name).unwrap_or_else(|| "0".into());
    Ok(Place {
        source: Source::Slurm,
        rank,
        world_size,
        local_rank,
        local_world_size,
        master,
        job: format!("slurm-{}/{}/{}", part(JOB), part(STEP), part("SLURM_RESTART_COUNT")),
        is_one_machine,
        has_agent_store: false,
    })
}

/// Number of tasks on this node, and the variable that told it.
fn local_world_size(
    variables: &Variables<'_>,
    size: &'static str,
    world: usize,
) -> Result<(&'static str, usize)> {
    if variables.is_set(TASKS) {
        let text = variables.text(TASKS, "tasks of each node")?;
        let expected = format!("tasks of each node, such as 4(x2),3, which make {world} ({size})");
        let tasks = tasks_per_node(&text, world).filter(|tasks| tasks.iter().sum::<usize>() == world);
        let tasks = tasks.ok_or_else(|| wrong(TASKS, format!("`{text}`"), &expected))?;
        let node = match tasks.len() {
            1 if !variables.is_set(NODE) => 0,
            nodes => variables.below(NODE, "the number of nodes", nodes)?,
        };
        return Ok((TASKS, tasks[node]));
    }
    if variables.is_set(TASKS_OF_EACH) {
        return Ok((TASKS_OF_EACH, variables.up_to(TASKS_OF_EACH, size, world)?));
    }
    // A world of one needs nobody to say so.
    if world == 1 { Ok((size, 1)) } else { Err(wrong(TASKS, "not set".into(), "tasks of each node")) }
}

/// Reads `4(x2),3` as 4, 4, 3; `None` if it is nothing like that, or makes more than `world` nodes.
fn tasks_per_node(text: &str, world: usize) -> Option<Vec<usize>> {
    let mut all = Vec::new();
    for part in text.trim().split(',') {
        let (tasks, times) = match part.split_once("(x") {
            None => (part, 1),
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse::<usize>().ok()?),
        };
        let tasks = tasks.parse::<usize>().ok().filter(|tasks| (1..=world).contains(tasks))?;
        if times == 0 || times > world - all.len().min(world) {
            return None;
        }
        all.extend(std::iter::repeat_n(tasks, times));
    }
    Some(all)
}

/// The first of `node[003-005,9],gpu7`, which is `node003`. `None` if this is no list of nodes.
fn first_host(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list.trim();
    while let Some(at) = rest.find(['[', ',']) {
        host.push_str(&rest[..at]);
        if rest[at..].starts_with(',') {
            rest = "";
            break;
        }
        let (ranges, after) = rest[at + 1..].split_once(']')?;
        let first = ranges.split(['-', ',']).next()?;
        if first.is_empty() || !first.bytes().all(|c| c.is_ascii_digit()) {
            return None;
        }
        host.push_str(first);
        rest = after;
    }
    host.push_str(rest);
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    (!host.is_empty() && host.chars().all(is_name)).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_host_of_a_list_is_found() {
        for (list, host) in [
            ("node[003-005,9],gpu7", "node003"),
            ("gpu7,node[003-005]", "gpu7"),
            ("one", "one"),
            ("rack[1-2]node[07-08]", "rack1node07"),
            ("a[5,1]-ib.cluster.example,b", "a5-ib.cluster.example"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
        for wrong in ["", ",", "node[", "node[]", "node[-3]", "node[x-y]", "node]3", "a b"] {
            assert_eq!(first_host(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn tasks_of_each_node_are_counted() {
        assert_eq!(tasks_per_node("4(x2),3", 11).unwrap(), [4, 4, 3]);
        assert_eq!(tasks_per_node("8", 8).unwrap(), [8]);
        for wrong in ["", "x", "4(x", "4(x2", "4(x0)", "0", "4(x99999999999)", "4,,3", "-1"] {
            assert_eq!(tasks_per_node(wrong, 11), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_readers_panic(text in "[0-9a-c(x),\\[\\] -]{0,24}", world in 1usize..100) {
            let _ = first_host(&text);
            let _ = tasks_per_node(&text, world);
        }

        #[test]
        fn tasks_written_as_slurm_writes_them_are_read_back(nodes in prop::collection::vec((1usize..9, 1usize..5), 1..6)) {
            let text: Vec<String> = nodes
                .iter()
                .map(|(tasks, times)| if *times == 1 { tasks.to_string() } else { format!("{tasks}(x{times})") })
                .collect();
            let all: Vec<usize> = nodes.iter().flat_map(|(tasks, times)| vec![*tasks; *times]).collect();
            prop_assert_eq!(tasks_per_node(&text.join(","), all.iter().sum()), Some(all));
        }
    }
}
