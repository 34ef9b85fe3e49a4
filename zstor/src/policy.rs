//! What must be survivable, and the geometry that achieves it.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Most shards of a stripe (`k + m`).
pub const SHARDS_MAX: usize = 64;

/// Why a policy or geometry is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Not of the form `K+M`.
    #[error("{0:?} is not a geometry: write K+M, such as 4+4 (4 data shards, 4 parity shards)")]
    Syntax(String),
    /// Out of range.
    #[error(
        "geometry {data}+{parity} is out of range: K and M at least 1, K+M at most {SHARDS_MAX}"
    )]
    Range {
        /// Data shards asked for.
        data: u32,
        /// Parity shards asked for.
        parity: u32,
    },
}

/// `k` data and `m` parity shards; valid by construction.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u32, u32)", into = "(u32, u32)")]
pub struct Geometry {
    data: u8,
    parity: u8,
}

impl Geometry {
    /// Checks `1 <= k`, `1 <= m`, `k + m <= SHARDS_MAX`.
    pub fn new(data: u32, parity: u32) -> Result<Self, PolicyError> {
        let range = PolicyError::Range { data, parity };
        if data == 0 || parity == 0 || data.saturating_add(parity) as usize > SHARDS_MAX {
            return Err(range);
        }
        match (u8::try_from(data), u8::try_from(parity)) {
            (Ok(data), Ok(parity)) => Ok(Self { data, parity }),
            _ => Err(range),
        }
    }

    /// `k`: shards that suffice to read.
    pub const fn data(self) -> usize {
        self.data as usize
    }

    /// `m`: shards that may be lost.
    pub const fn parity(self) -> usize {
        self.parity as usize
    }

    /// `k + m`.
    pub const fn total(self) -> usize {
        self.data() + self.parity()
    }
}

impl TryFrom<(u32, u32)> for Geometry {
    type Error = PolicyError;
    fn try_from((data, parity): (u32, u32)) -> Result<Self, PolicyError> {
        Self::new(data, parity)
    }
}

impl From<Geometry> for (u32, u32) {
    fn from(geometry: Geometry) -> Self {
        (u32::from(geometry.data), u32::from(geometry.parity))
    }
}

impl FromStr for Geometry {
    type Err = PolicyError;
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let syntax = || PolicyError::Syntax(text.to_owned());
        let (data, parity) = text.split_once('+').ok_or_else(syntax)?;
        let number = |part: &str| part.trim().parse::<u32>().map_err(|_| syntax());
        Self::new(number(data)?, number(parity)?)
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.data, self.parity)
    }
}

impl fmt::Debug for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A volume's policy: the geometry new stripes get and what every stripe must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// `k + m` of new stripes.
    pub geometry: Geometry,
    /// Any so many locations may be lost at once.
    pub survive_locations: u32,
    /// Any so many nodes may be lost at once.
    pub survive_nodes: u32,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.geometry, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_parses_what_it_prints_and_refuses_the_rest() {
        for (data, parity) in [(1, 1), (4, 4), (10, 5), (63, 1)] {
            let geometry = Geometry::new(data, parity).expect("in range");
            assert_eq!(geometry.to_string().parse(), Ok(geometry));
        }
        for bad in [
            "",
            "4",
            "4+",
            "+4",
            "0+4",
            "4+0",
            "64+1",
            "4+4+4",
            "a+b",
            "4294967295+1",
        ] {
            assert!(bad.parse::<Geometry>().is_err(), "{bad:?}");
        }
    }
}
