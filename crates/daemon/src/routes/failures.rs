//! The documented failures, the same for every route.

use std::collections::BTreeMap;

use forkd_wire::api::error::ErrorBody;
use forkd_wire::error::ErrorCode;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::response::{Response, ResponseBuilder};
use utoipa::openapi::{Ref, RefOr};
use utoipa::{IntoResponses, PartialSchema, ToSchema};

/// Every status a route may refuse or fail with.
pub(crate) struct Failures;

impl IntoResponses for Failures {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let mut codes: BTreeMap<u16, Vec<&str>> = BTreeMap::new();
        for code in ErrorCode::ALL {
            codes.entry(code.status()).or_default().push(code.as_str());
        }
        let answer = |codes: Vec<&str>| {
            let schema = Ref::from_schema_name(ErrorBody::name());
            let content = ContentBuilder::new().schema(Some(schema)).build();
            let response = ResponseBuilder::new()
                .description(format!("code {}", codes.join(" or ")))
                .content("application/json", content);
            RefOr::T(response.build())
        };
        codes
            .into_iter()
            .map(|(status, codes)| (status.to_string(), answer(codes)))
            .collect()
    }
}

// Names the schema in the document's components.
const _: fn() -> RefOr<utoipa::openapi::Schema> = <ErrorBody as PartialSchema>::schema;
