//! One gRPC channel to one metad node.

use crate::dial::{Dial, TlsDial};
use crate::server::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};
use crate::wire::{PROTOCOL_KEY, PROTOCOL_VERSION};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tonic::metadata::MetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};

/// Adds what every request carries.
pub(crate) type Versioned =
    InterceptedService<Channel, fn(Request<()>) -> Result<Request<()>, Status>>;

/// Makes a channel that says our protocol version with every request.
pub(crate) fn versioned(channel: Channel) -> Versioned {
    InterceptedService::new(channel, add_version)
}

#[expect(clippy::unnecessary_wraps, reason = "the shape of an interceptor")]
fn add_version(mut request: Request<()>) -> Result<Request<()>, Status> {
    let version = MetadataValue::from(PROTOCOL_VERSION);
    request.metadata_mut().insert(PROTOCOL_KEY, version);
    Ok(request)
}

/// What is wrong with an address of the form `host:port`, if anything.
pub(crate) fn endpoint_of(address: &str) -> Result<Endpoint, String> {
    let has_port = address
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if !has_port {
        return Err(format!("{address:?} is not host:port"));
    }
    // The scheme is for tonic only: TLS is the dialler's.
    Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| format!("{address:?} is not host:port: {error}"))
}

/// Connects: TCP, then TLS with the server name of metad.
pub(crate) async fn connect(
    address: &str,
    config: Arc<ClientConfig>,
    deadline: Duration,
) -> Result<Channel, String> {
    connect_over(address, TlsDial::over(config), deadline).await
}

/// The same over whatever `dial` opens.
pub(crate) async fn connect_over(
    address: &str,
    dial: Arc<dyn Dial>,
    deadline: Duration,
) -> Result<Channel, String> {
    let endpoint = endpoint_of(address)?
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let target = address.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (target, dial) = (target.clone(), dial.clone());
        async move { Ok::<_, io::Error>(TokioIo::new(dial.dial(&target).await?)) }
    });
    match tokio::time::timeout(deadline, endpoint.connect_with_connector(connector)).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(describe(&error)),
        Err(_) => Err(format!("no connection within {deadline:?}")),
    }
}

/// The innermost causes, without what each layer repeats.
pub(crate) fn describe(error: &(dyn Error + 'static)) -> String {
    let mut texts = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !texts.contains(&text) {
            texts.push(text);
        }
        cause = inner.source();
    }
    texts.join(": ")
}
