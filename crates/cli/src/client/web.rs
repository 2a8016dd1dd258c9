//! HTTP/1.1 to a daemon, with or without TLS.

use std::time::Duration;

use axum::body::Body;
use http::{Request, Response, Uri};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioExecutor;

use crate::failure::{Failure, chain};

/// How long it may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A daemon's address and the connections to it.
#[derive(Debug, Clone)]
pub(super) struct Web {
    base: String,
    host: String,
    client: Client<HttpsConnector<HttpConnector>, Body>,
}

impl Web {
    /// Reads a URL such as `http://127.0.0.1:8889` or `https://node-3/forkd`.
    pub(super) fn new(url: &str) -> Result<Self, Failure> {
        let wrong = |why: &str| {
            Failure::new(format!("`{url}` is no address of a daemon: {why}"))
                .with_help("write it like http://127.0.0.1:8889 or https://node-3:8889")
                .with_exit(crate::failure::exit::USAGE)
        };
        let uri: Uri = url.trim().parse().map_err(|_| wrong("it is no URL"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(wrong("it does not begin with http:// or https://"));
        }
        if uri.query().is_some() {
            return Err(wrong("it holds a query"));
        }
        let host = uri
            .host()
            .ok_or_else(|| wrong("it names no host"))?
            .to_owned();
        let client = Client::builder(TokioExecutor::new()).build(connector(&uri)?);
        Ok(Self {
            base: url.trim().trim_end_matches('/').to_owned(),
            host,
            client,
        })
    }

    /// The address as it was given.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// Whether the daemon is on this host.
    pub(super) fn is_local(&self) -> bool {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    }

    /// The full address of a path.
    pub(super) fn uri(&self, path: &str) -> Result<Uri, Failure> {
        let text = format!("{}{path}", self.base);
        text.parse()
            .map_err(|error| Failure::caused(format!("`{text}` is no address"), &error))
    }

    /// Sends a request.
    pub(super) async fn send(&self, request: Request<Body>) -> Result<Response<Body>, Failure> {
        match self.client.request(request).await {
            Ok(response) => Ok(response.map(Body::new)),
            Err(error) => Err(self.unreachable(&error)),
        }
    }

    fn unreachable(&self, error: &Error) -> Failure {
        let cause = std::error::Error::source(error).map_or_else(|| chain(error), chain);
        if error.is_connect() {
            Failure::new(format!("cannot reach the daemon at {}: {cause}", self.base)).with_help(
                "start one with `forkd serve &` or `systemctl start forkd-controller`, or name \
                 another with --daemon-url",
            )
        } else {
            Failure::new(format!(
                "the connection to the daemon at {} broke: {cause}",
                self.base
            ))
            .with_help("see the daemon's log; `forkd ls` shows what it still runs")
        }
    }
}

fn connector(uri: &Uri) -> Result<HttpsConnector<HttpConnector>, Failure> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let builder = hyper_rustls::HttpsConnectorBuilder::new();
    // Reading the host's certificates costs milliseconds that plain HTTP need not pay.
    let builder = if uri.scheme_str() == Some("https") {
        builder
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
            .map_err(|error| {
                Failure::caused("cannot read the host's certificates", &error)
                    .with_help("install ca-certificates, or set SSL_CERT_FILE to the daemon's CA")
            })?
    } else {
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Failure::caused("cannot set up TLS", &error))?
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        builder.with_tls_config(config)
    };
    Ok(builder.https_or_http().enable_http1().wrap_connector(http))
}
