//! A server on a loopback port and a client that sends bytes and shows answers.

use qsfs_zdb::engine::{Engine, EngineOptions};
use qsfs_zdb::server::{ServerConfig, apply_mode, serve};
use sha1::{Digest, Sha1};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// No answer takes this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server with its runtime; stops when dropped.
pub(crate) struct Running {
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) address: SocketAddr,
    pub(crate) stop: CancellationToken,
    pub(crate) engine: Arc<Engine>,
    pub(crate) dir: TempDir,
    pub(crate) serving: Option<tokio::task::JoinHandle<std::io::Result<()>>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        self.engine.close();
    }
}

pub(crate) fn start(config: ServerConfig) -> Running {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::open(EngineOptions {
        root: Some(dir.path().to_owned()),
        ..EngineOptions::default()
    });
    let engine = Arc::new(engine.unwrap());
    apply_mode(&engine, config.mode).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let stop = CancellationToken::new();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = listener.local_addr().unwrap();
    let serving = runtime.spawn(serve(listener, Arc::clone(&engine), config, stop.clone()));
    Running {
        runtime,
        address,
        stop,
        engine,
        dir,
        serving: Some(serving),
    }
}

/// As 0-db is started without options.
pub(crate) fn plain() -> Running {
    start(ServerConfig::default())
}

pub(crate) struct Raw {
    pub(crate) stream: BufReader<TcpStream>,
}

impl Raw {
    pub(crate) fn connect(running: &Running) -> Self {
        let stream = TcpStream::connect(running.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    pub(crate) fn send(&mut self, arguments: &[&[u8]]) {
        self.bytes(&framed(arguments));
    }

    /// The next answer, readable: `+OK`, `:1`, `nil`, `"bulk"`, `[a b]`, `-error`.
    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => return "closed".to_owned(),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                return "reset".to_owned();
            }
            Err(error) => panic!("no answer: {error}"),
        }
        let line = line.trim_end();
        let (kind, rest) = line.split_at(1);
        match kind {
            "$" if rest == "-1" => "nil".to_owned(),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().unwrap() + 2];
                self.stream.read_exact(&mut bytes).unwrap();
                assert!(bytes.ends_with(b"\r\n"));
                bytes.truncate(bytes.len() - 2);
                format!("\"{}\"", bytes.escape_ascii())
            }
            "*" => {
                let count: usize = rest.parse().unwrap();
                let items: Vec<String> = (0..count).map(|_| self.answer()).collect();
                format!("[{}]", items.join(" "))
            }
            _ => line.to_owned(),
        }
    }

    pub(crate) fn ask(&mut self, arguments: &[&[u8]]) -> String {
        self.send(arguments);
        self.answer()
    }

    /// Words split at spaces; `""` is an empty argument, `{k*256}` the letter so many times, `{00ff}` bytes in hex.
    pub(crate) fn say(&mut self, line: &str) -> String {
        let words: Vec<Vec<u8>> = line.split(' ').map(word).collect();
        let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
        self.ask(&words)
    }

    pub(crate) fn table(&mut self, rows: &[(&str, &str)]) {
        for (line, wanted) in rows {
            assert_eq!(&self.say(line), wanted, "{line}");
        }
    }
}

fn word(text: &str) -> Vec<u8> {
    if text == "\"\"" {
        return Vec::new();
    }
    let Some(inner) = text
        .strip_prefix('{')
        .and_then(|text| text.strip_suffix('}'))
    else {
        return text.as_bytes().to_vec();
    };
    if let Some((letter, count)) = inner.split_once('*') {
        return letter.as_bytes().repeat(count.parse().unwrap());
    }
    (0..inner.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&inner[at..at + 2], 16).unwrap())
        .collect()
}

/// A request as it goes over the wire.
pub(crate) fn framed(arguments: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", arguments.len()).into_bytes();
    for argument in arguments {
        bytes.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        bytes.extend_from_slice(argument);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

/// What SECURE wants: hex sha1 of nonce and password.
pub(crate) fn proof(nonce: &str, password: &str) -> String {
    let digest = Sha1::digest(format!("{nonce}:{password}").as_bytes());
    digest.iter().fold(String::new(), |mut text, byte| {
        text.push_str(&format!("{byte:02x}"));
        text
    })
}

/// The names of the fields of an answer to INFO or NSINFO, in order.
pub(crate) fn fields(answer: &str) -> Vec<String> {
    let lines = answer.trim_matches('"').split("\\n");
    let named = lines.filter_map(|line| line.split_once(": "));
    named.map(|(name, _)| name.to_owned()).collect()
}

/// The value of a field.
pub(crate) fn field<'a>(answer: &'a str, name: &str) -> &'a str {
    let lines = answer.trim_matches('"').split("\\n");
    let mut named = lines.filter_map(|line| line.split_once(": "));
    let found = named.find(|(found, _)| *found == name);
    found.unwrap_or_else(|| panic!("no {name} in {answer}")).1
}
