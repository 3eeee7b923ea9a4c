//! The variables that Open MPI's `mpirun` gives to each process it starts

use super::place::{Place, Source, THIS_MACHINE, Variables, port_of_job};
use super::wrong;
use crate::error::Result;
use crate::operation::digest;

const RANK: &str = "OMPI_COMM_WORLD_RANK";
const SIZE: &str = "OMPI_COMM_WORLD_SIZE";
const LOCAL_RANK: &str = "OMPI_COMM_WORLD_LOCAL_RANK";
const LOCAL_SIZE: &str = "OMPI_COMM_WORLD_LOCAL_SIZE";

/// Where `mpirun` itself listens, up to Open MPI 4: `number;tcp://address,address:port;…`.
const MPIRUN_URI: &str = "OMPI_MCA_orte_hnp_uri";

/// The job's name: of PMIx from Open MPI 5 on, of its own before.
const JOBS: [&str; 2] = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"];

pub(super) fn is_set(variables: &Variables<'_>) -> bool {
    variables.is_set(RANK) || variables.is_set(SIZE)
}

pub(super) fn place(variables: &Variables<'_>) -> Result<Place> {
    let world_size = variables.world(SIZE)?;
    let rank = variables.below(RANK, SIZE, world_size)?;
    let local_world_size = variables.up_to(LOCAL_SIZE, SIZE, world_size)?;
    let local_rank = variables.below(LOCAL_RANK, LOCAL_SIZE, local_world_size)?;
    let is_one_machine = local_world_size == world_size;
    let job = variables.first(&JOBS).and_then(|name| variables.get(name)).filter(|job| !job.is_empty());
    let address = || {
        if is_one_machine {
            return Ok(Some(THIS_MACHINE.into()));
        }
        let Some(uri) = variables.get(MPIRUN_URI) else { return Ok(None) };
        let first = "`number;tcp://address:port`, where mpirun listens, on rank 0's machine; or MASTER_ADDR";
        mpirun_address(&uri).map(Some).ok_or_else(|| wrong(MPIRUN_URI, format!("`{uri}`"), first))
    };
    let port = || job.as_ref().map(|job| port_of_job(digest(job.bytes().map(usize::from))));
    let master = if world_size > 1 { Some(variables.master(address, port)?) } else { None };
    Ok(Place {
        source: Source::OpenMpi,
        rank,
        world_size,
        local_rank,
        local_world_size,
        master,
        job: format!("openmpi-{}", job.unwrap_or_default()),
        is_one_machine,
        has_agent_store: false,
    })
}

/// The first address in mpirun's URI.
fn mpirun_address(uri: &str) -> Option<String> {
    let tcp = uri.split(';').find_map(|part| part.strip_prefix("tcp://"))?;
    let (addresses, port) = tcp.rsplit_once(':')?;
    let address = addresses.split(',').next()?;
    (port.parse::<u16>().is_ok() && !address.is_empty()).then(|| address.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mpiruns_address_is_the_first_of_those_it_listens_on() {
        let address = |uri| mpirun_address(uri);
        assert_eq!(address("14606.0;tcp://192.0.2.2:55589;tcp6://[fd00::2]:46629").unwrap(), "192.0.2.2");
        assert_eq!(address("1.0;tcp://10.0.0.5,172.17.0.1:35443").unwrap(), "10.0.0.5");
        for wrong in ["", "1.0", "1.0;tcp6://[fd00::2]:1", "1.0;tcp://", "1.0;tcp://:1", "1.0;tcp://a:x"] {
            assert_eq!(address(wrong), None, "{wrong}");
        }
    }
}
