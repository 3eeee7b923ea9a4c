//! Dealing an epoch's prompts to ranks, each prompt once or as a group of copies.
//!
//! Group sampling (GRPO and its kin) asks for `size` answers to every prompt and compares them with each other. All
//! copies of a prompt therefore belong to one epoch and are consumed or repeated together; padding adds, and dropping
//! leaves out, whole groups.

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::keyed::splitmix64;
use crate::sampler::Tail;

/// Every prompt comes several times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Groups {
    /// Copies of each prompt, at least 1.
    pub size: usize,
    /// On which ranks they are.
    pub placement: GroupPlacement,
}

/// Where the copies of a prompt are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupPlacement {
    /// One after the other on one rank: the group's rewards are compared there, and an engine can share the prompt's
    /// cache between them.
    OneRank,
    /// On one rank after the other: the answers of a hard prompt, which are long, do not hold up one rank alone.
    Spread,
}

/// One draw of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Draw {
    /// Index in the data set.
    pub index: usize,
    /// Which prompt of the epoch it is, counted over all ranks: the copies of a prompt share this number, and nothing
    /// else in the epoch has it, not even the same sample where it is padding.
    pub group: u64,
    /// Which copy, from 0 up to the size of the group.
    pub copy: usize,
}

/// How the positions of an epoch lie on ranks and rows. A row is one draw on each rank.
///
/// The smallest number of whole groups that fills whole rows is a block. An epoch is a number of blocks.
#[derive(Clone, Debug)]
pub(crate) struct Deal {
    world: u64,
    size: u64,
    placement: GroupPlacement,
    block_groups: u64,
    block_rows: u64,
    /// Rows of an epoch.
    pub(crate) rows: u64,
}

impl Deal {
    pub(crate) fn new(
        positions: usize,
        world: usize,
        groups: Option<Groups>,
        tail: Tail,
    ) -> Result<Self, Error> {
        let groups = groups.unwrap_or(Groups { size: 1, placement: GroupPlacement::OneRank });
        let (block_groups, block_rows) = match groups.placement {
            GroupPlacement::OneRank => (world, groups.size),
            GroupPlacement::Spread => {
                let common = gcd(world as u64, groups.size as u64) as usize;
                (world / common, groups.size / common)
            }
        };
        let blocks = match tail {
            Tail::Pad => positions.div_ceil(block_groups),
            Tail::Drop => positions / block_groups,
        };
        let rows = blocks.checked_mul(block_rows).filter(|rows| rows.checked_mul(world).is_some());
        let Some(rows) = rows else {
            return Err(Error::TooLarge { what: "the padded length", len: positions, needed: usize::MAX });
        };
        Ok(Self {
            world: world as u64,
            size: groups.size as u64,
            placement: groups.placement,
            block_groups: block_groups as u64,
            block_rows: block_rows as u64,
            rows: rows as u64,
        })
    }

    /// The group, counted over all ranks, and the copy that a rank draws in a row.
    pub(crate) fn place(&self, row: u64, rank: u64) -> (u64, u64) {
        if self.size == 1 {
            return (row * self.world + rank, 0); // the same, without the divisions
        }
        match self.placement {
            GroupPlacement::OneRank => (row / self.size * self.world + rank, row % self.size),
            GroupPlacement::Spread => {
                let draw = row * self.world + rank;
                (draw / self.size, draw % self.size)
            }
        }
    }

    /// Another seat for a rank, among those of its row or, where groups stay on one rank, of its block: the same for
    /// all rows of the block, another for each block.
    ///
    /// Data sets of a mixture take turns in a period. Were the seats fixed, and the period of turns and the number of
    /// ranks had something in common, some ranks would see one data set only.
    pub(crate) fn rotated(&self, row: u64, rank: u64) -> u64 {
        let turn = match self.placement {
            GroupPlacement::OneRank => row / self.size,
            GroupPlacement::Spread => row,
        };
        (rank + splitmix64(turn) % self.world) % self.world
    }

    /// Groups of which every copy has been drawn after so many rows.
    pub(crate) fn whole_groups(&self, rows: u64) -> u64 {
        match self.placement {
            GroupPlacement::OneRank => rows / self.block_rows * self.block_groups,
            GroupPlacement::Spread => rows * self.world / self.size,
        }
    }

    /// The row of this deal at which to go on after `rows` rows of `other`, which deals the same positions to another
    /// number of ranks: the last one that leaves nothing out.
    pub(crate) fn row_after(&self, other: &Deal, rows: u64) -> u64 {
        let row = match self.placement {
            _ if self.world == other.world => rows,
            GroupPlacement::OneRank => other.whole_groups(rows) / self.block_groups * self.block_rows,
            // Draws lie in one line, whatever the number of ranks.
            GroupPlacement::Spread => rows * other.world / self.world,
        };
        row.min(self.rows)
    }
}

pub(crate) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
