//! The interface's own description, made from the routes.

use forkd_wire::api;
use serde::Serialize as _;
use utoipa::OpenApi;
use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{ComponentsBuilder, OpenApi as Document};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "forkd",
        description = "Forks warmed virtual machines into sandboxes.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(api::error::ErrorBody)),
    security(("token" = []), ())
)]
struct Base;

/// The document of all routes.
pub fn document() -> Document {
    let (_, routes) = crate::http::router::routes().split_for_parts();
    let mut document = Base::openapi().merge_from(routes);
    for item in document.paths.paths.values_mut() {
        let operations = [
            &mut item.get,
            &mut item.post,
            &mut item.put,
            &mut item.delete,
        ];
        operations.into_iter().flatten().for_each(name_by_resource);
    }
    let token = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    let components = document.components.take().unwrap_or_default();
    let components = ComponentsBuilder::from(components).security_scheme("token", token);
    document.components = Some(components.build());
    document
}

/// Makes the operation's id distinct: routes of several resources share their names.
fn name_by_resource(operation: &mut Operation) {
    let tag = operation.tags.as_ref().and_then(|tags| tags.first());
    if let (Some(tag), Some(id)) = (tag, &operation.operation_id) {
        operation.operation_id = Some(format!("{tag}_{id}"));
    }
}

/// The document as it is served and checked in: indented by one space, for its depth would more than double its size.
pub fn document_json() -> String {
    let mut text = Vec::new();
    let pretty = serde_json::ser::PrettyFormatter::with_indent(b" ");
    let mut writer = serde_json::Serializer::with_formatter(&mut text, pretty);
    document()
        .serialize(&mut writer)
        .expect("maps with string keys only, into memory");
    text.push(b'\n');
    String::from_utf8(text).expect("JSON is UTF-8")
}

#[cfg(test)]
mod tests;
