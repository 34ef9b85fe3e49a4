//! The commands, by name.

/// A command of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Get,
    Set,
    SetX,
    Del,
    MGet,
    Exists,
    Check,
    Length,
    KeyTime,
    Scan,
    ScanX,
    RScan,
    KScan,
    KeyCur,
    History,
    Ping,
    Time,
    Info,
    Auth,
    Select,
    NsNew,
    NsDel,
    NsList,
    NsSet,
    NsInfo,
    NsJump,
    Reload,
    Flush,
    DbSize,
    Wait,
    Hooks,
    Index,
    Data,
    Mirror,
    Master,
    Stop,
    Asterisk,
}

/// What is asked for most stands first.
const NAMES: [(&str, Command); 37] = [
    ("GET", Command::Get),
    ("SET", Command::Set),
    ("DEL", Command::Del),
    ("SETX", Command::SetX),
    ("MGET", Command::MGet),
    ("EXISTS", Command::Exists),
    ("CHECK", Command::Check),
    ("LENGTH", Command::Length),
    ("KEYTIME", Command::KeyTime),
    ("SCAN", Command::Scan),
    ("SCANX", Command::ScanX),
    ("RSCAN", Command::RScan),
    ("KSCAN", Command::KScan),
    ("KEYCUR", Command::KeyCur),
    ("HISTORY", Command::History),
    ("PING", Command::Ping),
    ("TIME", Command::Time),
    ("INFO", Command::Info),
    ("AUTH", Command::Auth),
    ("SELECT", Command::Select),
    ("NSNEW", Command::NsNew),
    ("NSDEL", Command::NsDel),
    ("NSLIST", Command::NsList),
    ("NSSET", Command::NsSet),
    ("NSINFO", Command::NsInfo),
    ("NSJUMP", Command::NsJump),
    ("RELOAD", Command::Reload),
    ("FLUSH", Command::Flush),
    ("DBSIZE", Command::DbSize),
    ("WAIT", Command::Wait),
    ("HOOKS", Command::Hooks),
    ("INDEX", Command::Index),
    ("DATA", Command::Data),
    ("MIRROR", Command::Mirror),
    ("MASTER", Command::Master),
    ("STOP", Command::Stop),
    ("*", Command::Asterisk),
];

impl Command {
    /// By its whole name, in any case. The original takes any prefix; no client is known to need that, and a typing error should not
    /// become another command.
    pub(super) fn named(name: &[u8]) -> Option<Self> {
        let found = NAMES
            .iter()
            .find(|(known, _)| known.as_bytes().eq_ignore_ascii_case(name));
        found.map(|(_, command)| *command)
    }

    pub(super) fn name(self) -> &'static str {
        let found = NAMES.iter().find(|(_, command)| *command == self);
        found.map_or("", |(name, _)| name)
    }

    /// May it be carried out while writes of the same connection are under way? Everything else sees what was written before it.
    pub(super) fn may_overtake_writes(self) -> bool {
        matches!(self, Self::Set | Self::SetX | Self::Del | Self::Ping)
    }
}

#[cfg(test)]
mod tests {
    use super::{Command, NAMES};

    #[test]
    fn names_are_whole_in_any_case_and_unique() {
        for (number, (name, command)) in NAMES.iter().enumerate() {
            assert_eq!(
                Command::named(name.to_ascii_lowercase().as_bytes()),
                Some(*command)
            );
            assert_eq!(command.name(), *name);
            assert!(NAMES[..number].iter().all(|(other, _)| other != name));
        }
        for unknown in [&b""[..], b"G", b"GE", b"GETX", b"S", b"P", b"PINGPING"] {
            assert_eq!(Command::named(unknown), None);
        }
    }
}
