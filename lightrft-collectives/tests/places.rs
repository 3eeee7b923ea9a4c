//! Who a process is among the ranks of a job: torchrun's, Open MPI's and Slurm's variables, and URLs
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;

use lightrft_collectives::{Error, Rendezvous, Result, Source};

/// Variables and their values.
type Set = [(&'static str, &'static str)];

const TORCHRUN: [(&str, &str); 6] = [
    ("RANK", "3"),
    ("WORLD_SIZE", "8"),
    ("LOCAL_RANK", "1"),
    ("LOCAL_WORLD_SIZE", "2"),
    ("MASTER_ADDR", "127.0.0.1"),
    ("MASTER_PORT", "2222"),
];

/// The second node of two with 4, and one with 3 tasks.
const SLURM: [(&str, &str); 9] = [
    ("SLURM_PROCID", "6"),
    ("SLURM_STEP_NUM_TASKS", "11"),
    ("SLURM_NTASKS", "64"),
    ("SLURM_LOCALID", "2"),
    ("SLURM_NODEID", "1"),
    ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3"),
    ("SLURM_STEP_NODELIST", "node[003-004],gpu7"),
    ("SLURM_JOB_ID", "1234567"),
    ("SLURM_STEP_ID", "0"),
];

/// As Open MPI 4.1 sets them for rank 2 of 3 on two machines.
const OPEN_MPI: [(&str, &str); 6] = [
    ("OMPI_COMM_WORLD_RANK", "2"),
    ("OMPI_COMM_WORLD_SIZE", "3"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
    ("OMPI_MCA_orte_hnp_uri", "1460666368.0;tcp://192.0.2.2:55589;tcp6://[fd00::2]:46629"),
    ("OMPI_MCA_ess_base_jobid", "1460666369"),
];

fn read<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Rendezvous> {
    let variables: HashMap<&str, &str> = variables.into_iter().collect();
    Rendezvous::from_variables(|name| variables.get(name).map(ToString::to_string))
}

/// These variables with one changed, or taken away.
fn with(
    variables: &[(&'static str, &'static str)],
    variable: &str,
    value: Option<&str>,
) -> Result<Rendezvous> {
    let others = variables.iter().filter(|(name, _)| *name != variable);
    let changed = value.map(|value| (variable, value));
    let all: Vec<(&str, &str)> = others.map(|(name, value)| (*name, *value)).chain(changed).collect();
    read(all)
}

/// Rank, world size, local rank and local world size.
fn place(rendezvous: &Rendezvous) -> [usize; 4] {
    let r = rendezvous;
    [r.rank(), r.world_size(), r.local_rank(), r.local_world_size()]
}

#[test]
fn torchruns_variables_are_read() {
    let rendezvous = read(TORCHRUN).unwrap();
    assert_eq!((rendezvous.source(), place(&rendezvous)), (Source::Torchrun, [3, 8, 1, 2]));
    assert_eq!(rendezvous.master(), Some(("127.0.0.1", 2222)));
    assert_eq!(with(&TORCHRUN, "LOCAL_RANK", None).unwrap().local_rank(), 1);
}

#[test]
fn slurms_variables_are_read() {
    let rendezvous = read(SLURM).unwrap();
    assert_eq!((rendezvous.source(), place(&rendezvous)), (Source::Slurm, [6, 11, 2, 4]));
    assert_eq!(rendezvous.master(), Some(("node003", 15_000 + 4567)));
    // What the user says goes first.
    let told = read(SLURM.into_iter().chain([("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "80")])).unwrap();
    assert_eq!(told.master(), Some(("10.0.0.1", 80)));
    // A job that is one step, in the variables of the job.
    let job = [
        ("SLURM_PROCID", "1"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_NTASKS", "4"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NTASKS_PER_NODE", "2"),
        ("SLURM_JOB_NODELIST", "a-[1,7]"),
        ("SLURM_JOB_ID", "12"),
    ];
    let rendezvous = read(job).unwrap();
    assert_eq!(place(&rendezvous), [1, 4, 1, 2]);
    assert_eq!(rendezvous.master(), Some(("a-1", 15_012)));
}

#[test]
fn a_step_on_one_node_meets_within_it() {
    let one_node = [
        ("SLURM_PROCID", "1"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "0"),
        ("SLURM_STEP_TASKS_PER_NODE", "2"),
        ("SLURM_STEP_NODELIST", "node3"),
        ("SLURM_JOB_ID", "99"),
    ];
    assert_eq!(read(one_node).unwrap().master(), Some(("127.0.0.1", 15_099)));
}

#[test]
fn a_batch_script_of_slurm_is_no_task_of_its_job() {
    let script =
        [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "64"), ("SLURM_LOCALID", "0"), ("SLURM_JOB_ID", "1")];
    let rendezvous = read(script).unwrap();
    assert_eq!((rendezvous.source(), rendezvous.world_size()), (Source::Alone, 1));
}

#[test]
fn open_mpis_variables_are_read() {
    let rendezvous = read(OPEN_MPI).unwrap();
    assert_eq!((rendezvous.source(), place(&rendezvous)), (Source::OpenMpi, [2, 3, 0, 1]));
    let (host, port) = rendezvous.master().unwrap();
    assert!(host == "192.0.2.2" && (15_000..25_000).contains(&port), "{host}:{port}");
    // Ranks of one machine need nobody to tell them where it is.
    let local = with(&OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE", Some("3")).unwrap();
    assert_eq!(local.master(), Some(("127.0.0.1", port)));
    // Another job meets elsewhere; Open MPI 5 names it otherwise.
    let other = with(&OPEN_MPI, "PMIX_NAMESPACE", Some("prterun-host-77@1")).unwrap();
    assert_ne!(other.master().unwrap().1, port);
}

#[test]
fn the_nearest_launcher_counts() {
    let all: Vec<(&str, &str)> = SLURM.into_iter().chain(OPEN_MPI).chain(TORCHRUN).collect();
    assert_eq!(read(all).unwrap().source(), Source::Torchrun);
    let mpirun_in_slurm: Vec<(&str, &str)> = SLURM.into_iter().chain(OPEN_MPI).collect();
    assert_eq!(read(mpirun_in_slurm).unwrap().source(), Source::OpenMpi);
    assert_eq!(read([]).unwrap().source(), Source::Alone);
}

#[test]
fn a_wrong_variable_is_named_with_what_it_holds() {
    let cases: [(&Set, &str, Option<&str>); 32] = [
        (&TORCHRUN, "RANK", Some("8")),
        (&TORCHRUN, "RANK", Some("x")),
        (&TORCHRUN, "RANK", None),
        (&TORCHRUN, "WORLD_SIZE", Some("0")),
        (&TORCHRUN, "WORLD_SIZE", Some("1000000000000000")),
        (&TORCHRUN, "WORLD_SIZE", Some("")),
        (&TORCHRUN, "WORLD_SIZE", None),
        (&TORCHRUN, "LOCAL_RANK", Some("2")),
        (&TORCHRUN, "LOCAL_WORLD_SIZE", Some("9")),
        (&TORCHRUN, "MASTER_ADDR", None),
        (&TORCHRUN, "MASTER_PORT", None),
        (&TORCHRUN, "MASTER_PORT", Some("65536")),
        (&TORCHRUN, "MASTER_PORT", Some("0")),
        (&TORCHRUN, "LIGHTRFT_TOKEN", Some("short")),
        (&TORCHRUN, "LIGHTRFT_TRUST_NETWORK", Some("maybe")),
        (&SLURM, "SLURM_PROCID", Some("11")),
        (&SLURM, "SLURM_STEP_NUM_TASKS", Some("x")),
        (&SLURM, "SLURM_LOCALID", Some("4")),
        (&SLURM, "SLURM_LOCALID", None),
        (&SLURM, "SLURM_NODEID", Some("3")),
        (&SLURM, "SLURM_NODEID", None),
        // One task too few for the step.
        (&SLURM, "SLURM_STEP_TASKS_PER_NODE", Some("4(x2),2")),
        (&SLURM, "SLURM_STEP_TASKS_PER_NODE", Some("4(x999999999)")),
        (&SLURM, "SLURM_STEP_TASKS_PER_NODE", None),
        (&SLURM, "SLURM_STEP_NODELIST", Some("node[")),
        (&OPEN_MPI, "OMPI_COMM_WORLD_RANK", Some("3")),
        (&OPEN_MPI, "OMPI_COMM_WORLD_SIZE", None),
        (&OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK", Some("1")),
        (&OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE", Some("4")),
        (&OPEN_MPI, "OMPI_MCA_orte_hnp_uri", Some("nowhere")),
        (&OPEN_MPI, "MASTER_PORT", Some("x")),
        (&SLURM, "MASTER_PORT", Some("-1")),
    ];
    for (variables, variable, value) in cases {
        let Err(error @ Error::Environment { .. }) = with(variables, variable, value) else {
            panic!("{variable}={value:?} was taken");
        };
        let text = error.to_string();
        let shown = if variable == "LIGHTRFT_TOKEN" { "5 bytes" } else { value.unwrap_or_default() };
        assert!(text.contains(variable) && text.contains(shown), "{text}");
    }
    // What is missing is named by what the user can set.
    for (variables, variable, named) in [
        (&OPEN_MPI[..], "OMPI_MCA_orte_hnp_uri", "MASTER_ADDR"),
        (&OPEN_MPI[..], "OMPI_MCA_ess_base_jobid", "MASTER_PORT"),
        (&SLURM[..], "SLURM_STEP_NODELIST", "MASTER_ADDR"),
        (&SLURM[..], "SLURM_JOB_ID", "MASTER_PORT"),
    ] {
        let error = with(variables, variable, None).unwrap_err();
        assert!(matches!(error, Error::Environment { variable, .. } if variable == named), "{error}");
    }
}

#[test]
fn urls_say_where_to_meet_and_the_rank() {
    let rendezvous = Rendezvous::from_url("tcp://localhost:2222?rank=1&world_size=2").unwrap();
    assert_eq!((rendezvous.rank(), rendezvous.world_size()), (1, 2));
    assert_eq!(rendezvous.master(), Some(("localhost", 2222)));
    let given = Rendezvous::from_url_as("tcp://[::1]:2222", 0, 2).unwrap();
    assert_eq!((given.rank(), given.world_size(), given.master()), (0, 2, Some(("::1", 2222))));
    assert!(matches!(Rendezvous::from_url_as("tcp://a:1?rank=0", 1, 2), Err(Error::Url { .. })));
    assert!(matches!(Rendezvous::from_url("file:///shared"), Err(Error::Url { .. })));
    // These tests run in no job.
    assert_eq!(Rendezvous::from_url("env://").unwrap().source(), Source::Alone);
}
