//! The documented failures, the same for every route.

use std::collections::BTreeMap;

use forkd_wire::api::error::ErrorBody;
use forkd_wire::error::ErrorCode;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::response::{Response, ResponseBuilder};
use utoipa::openapi::{Header, HeaderBuilder, ObjectBuilder, Ref, RefOr, Type};
use utoipa::{IntoResponses, PartialSchema, ToSchema};

/// Every status a route may refuse or fail with.
pub(crate) struct Failures;

impl IntoResponses for Failures {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let mut codes: BTreeMap<u16, Vec<ErrorCode>> = BTreeMap::new();
        for code in ErrorCode::ALL {
            codes.entry(code.status()).or_default().push(*code);
        }
        let answer = |codes: Vec<ErrorCode>| {
            let schema = Ref::from_schema_name(ErrorBody::name());
            let content = ContentBuilder::new().schema(Some(schema)).build();
            let names: Vec<&str> = codes.iter().map(|code| code.as_str()).collect();
            let mut response = ResponseBuilder::new()
                .description(format!("code {}", names.join(" or ")))
                .content("application/json", content);
            if codes.iter().any(|code| code.retry_after_secs().is_some()) {
                response = response.header("Retry-After", retry_after());
            }
            RefOr::T(response.build())
        };
        codes
            .into_iter()
            .map(|(status, codes)| (status.to_string(), answer(codes)))
            .collect()
    }
}

fn retry_after() -> Header {
    let seconds = ObjectBuilder::new().schema_type(Type::Integer);
    HeaderBuilder::new()
        .schema(Some(seconds))
        .description(Some(
            "seconds after which the same request may fare better; absent where somebody must change something first",
        ))
        .build()
}

// Names the schema in the document's components.
const _: fn() -> RefOr<utoipa::openapi::Schema> = <ErrorBody as PartialSchema>::schema;
