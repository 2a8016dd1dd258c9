//! The bench as one self-contained page: no script, no network, readable in light and dark.

use std::fmt::Write;

use super::plot::{self, Strip, escape};
use super::report::Report;
use crate::human;

const STYLE: &str = "
:root{color-scheme:light dark;--bg:#fbfbfd;--card:#fff;--ink:#1b1f29;--dim:#667085;--line:#e4e7ee;
--a:#3457d5;--b:#e07b39;--soft:#3457d566}
@media(prefers-color-scheme:dark){:root{--bg:#11141b;--card:#191d27;--ink:#e8ebf2;--dim:#98a2b6;
--line:#2b3140;--a:#7c9bff;--b:#f2a25f;--soft:#7c9bff70}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:960px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:17px;margin:0 0 4px}p{margin:0 0 12px}
.dim,figcaption{color:var(--dim);font-size:13.5px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:24px 0}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:14px 16px}.tile b{display:block;font-size:24px;font-variant-numeric:tabular-nums}
section{padding:20px 22px;margin:0 0 16px}figure{margin:0;overflow-x:auto}
svg{display:block;width:100%;min-width:560px;height:auto;margin-top:8px}
svg text{font:13px system-ui,sans-serif;fill:var(--ink)}svg .tick{fill:var(--dim);font-size:12px}
.grid{stroke:var(--line)}.dot{fill:var(--soft)}.p50{stroke:var(--a);stroke-width:3}
.p99{stroke:var(--b);stroke-width:3}.whisker{stroke:var(--dim);stroke-width:1.5}
path{fill:none;stroke-width:2.5}path.fork{stroke:var(--b)}path.ready{stroke:var(--a)}
rect.pss{fill:var(--b)}rect.private{fill:var(--a)}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin:0 5px 0 12px}
.key.a{background:var(--a)}.key.b{background:var(--b)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:6px 10px;border-bottom:1px solid var(--line)}
th{color:var(--dim);font-weight:500;font-size:13px}th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0}ul{margin:6px 0 0;padding-left:20px}
";

/// The page.
pub(super) fn page(report: &Report) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>forkd bench · {}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>forkd bench</h1>\n<p>{}</p>\n",
        escape(&report.tag),
        escape(&report.subject())
    );
    if let Some(host) = &report.host {
        let line = format!(
            "{}, {} CPUs, {} MiB, Linux {}",
            host.cpu_model, host.cpus, host.memory_mib, host.kernel
        );
        let _ = writeln!(page, "<p class=\"dim\">{}</p>", escape(&line));
    }
    tiles(&mut page, report);
    latency(&mut page, report);
    fan_out(&mut page, report);
    memory(&mut page, report);
    sizing(&mut page, report);
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn tiles(page: &mut String, report: &Report) {
    let stages = &report.stages;
    let p50 = |spread: Option<crate::stats::Spread>| spread.map(|spread| human::ms(spread.p50));
    let private = human::kib(report.memory_idle.private_kib.p50 as u64);
    let tiles = [
        (
            p50(stages.one_ready_ms),
            "one fork, agent ready, median".to_owned(),
        ),
        (
            Some(human::ms(report.fan_out_wall_ms)),
            format!("until all {} had answered", report.n),
        ),
        (p50(stages.exec_ms), "exec round trip, median".to_owned()),
        (
            Some(private),
            "private memory of an idle sandbox, median".to_owned(),
        ),
    ];
    page.push_str("<div class=\"tiles\">\n");
    for (value, caption) in tiles {
        let value = value.unwrap_or_else(|| "–".to_owned());
        let (value, caption) = (escape(&value), escape(&caption));
        let _ = writeln!(
            page,
            "<div class=\"tile\"><b>{value}</b><span class=\"dim\">{caption}</span></div>"
        );
    }
    page.push_str("</div>\n");
}

fn latency(page: &mut String, report: &Report) {
    let rows = report.rows();
    let strips: Vec<Strip<'_>> = rows
        .iter()
        .filter_map(|(name, sample, spread)| {
            spread.map(|spread| Strip {
                name,
                sample,
                p50: spread.p50,
                p99: spread.p99,
            })
        })
        .collect();
    let plot = plot::strips(&strips);
    let _ = write!(
        page,
        "<section>\n<h2>Every stage of a sandbox’s life</h2>\n<figure>\n<figcaption>Each dot is one \
         measurement; logarithmic scale.<span class=\"key a\"></span>median<span class=\"key b\">\
         </span>99th percentile</figcaption>\n{plot}\n</figure>\n<table>\n<tr><th>stage</th>\
         <th>samples</th><th>p50</th><th>p99</th><th>max</th></tr>\n"
    );
    for (name, sample, spread) in &rows {
        let Some(spread) = spread else { continue };
        let [p50, p99, max] = [spread.p50, spread.p99, spread.max].map(human::ms);
        let (name, count) = (escape(name), sample.len());
        let _ = writeln!(
            page,
            "<tr><td>{name}</td><td>{count}</td><td>{p50}</td><td>{p99}</td><td>{max}</td></tr>"
        );
    }
    page.push_str("</table>\n</section>\n");
}

fn fan_out(page: &mut String, report: &Report) {
    let curves = [
        ("fork", &*report.samples.fork_ms),
        ("ready", &*report.samples.ready_ms),
    ];
    let plot = plot::arrivals(&curves);
    let _ = write!(
        page,
        "<section>\n<h2>The fan-out</h2>\n<figure>\n<figcaption>Sandboxes so far, from one request for \
         {}.<span class=\"key b\"></span>machine runs<span class=\"key a\"></span>agent has \
         answered</figcaption>\n{plot}\n</figure>\n</section>\n",
        report.n
    );
}

fn memory(page: &mut String, report: &Report) {
    let (idle, warm) = (&report.memory_idle, &report.memory_after_eval);
    let bars = [
        (
            "idle, private",
            "private",
            idle.private_kib.p50,
            idle.private_kib.max,
        ),
        ("idle, PSS", "pss", idle.pss_kib.p50, idle.pss_kib.max),
        (
            "after eval, private",
            "private",
            warm.private_kib.p50,
            warm.private_kib.max,
        ),
        ("after eval, PSS", "pss", warm.pss_kib.p50, warm.pss_kib.max),
    ];
    let plot = plot::bars(&bars);
    let _ = write!(
        page,
        "<section>\n<h2>Memory of a sandbox’s process</h2>\n<figure>\n<figcaption>Median, with a line to \
         the maximum.<span class=\"key a\"></span>private: pages nobody else maps<span class=\"key \
         b\"></span>PSS: shared pages divided among their users</figcaption>\n{plot}\n</figure>\n\
         </section>\n"
    );
}

fn sizing(page: &mut String, report: &Report) {
    let advice = report.advice();
    if advice.is_empty() {
        return;
    }
    page.push_str("<section>\n<h2>What it means for a node</h2>\n<ul>\n");
    for line in advice {
        let _ = writeln!(page, "<li>{}</li>", escape(&line));
    }
    page.push_str("</ul>\n</section>\n");
}

#[cfg(test)]
mod tests {
    use super::super::report::example;
    use super::*;

    /// Every element that is opened is closed, in order.
    fn check_well_formed(page: &str) {
        const VOID: [&str; 2] = ["meta", "!doctype"];
        let mut open: Vec<String> = Vec::new();
        let mut rest = page;
        while let Some(at) = rest.find('<') {
            let end = rest[at..].find('>').expect("a tag that ends") + at;
            let tag = &rest[at + 1..end];
            rest = &rest[end + 1..];
            let name = |tag: &str| {
                tag.split([' ', '/'])
                    .next()
                    .unwrap_or_default()
                    .to_ascii_lowercase()
            };
            if let Some(closing) = tag.strip_prefix('/') {
                assert_eq!(
                    open.pop().as_deref(),
                    Some(name(closing).as_str()),
                    "</{closing}>"
                );
            } else if !tag.ends_with('/') && !VOID.contains(&name(tag).as_str()) {
                open.push(name(tag));
            }
        }
        assert_eq!(open, Vec::<String>::new());
    }

    #[test]
    fn the_page_is_well_formed_and_self_contained() {
        let page = page(&example());
        check_well_formed(&page);
        for outside in [
            "http:", "https:", "<script", "<link", "<img", "@import", "url(",
        ] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(page.contains("A &lt;CPU&gt; &amp; more"));
        assert!(
            !page.contains("NaN") && !page.contains("inf"),
            "a number is none"
        );
        assert!(page.contains("prefers-color-scheme:dark"));
    }

    #[test]
    fn an_empty_bench_still_makes_a_page() {
        let mut report = Report::default();
        report.conclude();
        let page = page(&report);
        check_well_formed(&page);
        assert!(!page.contains("NaN"));
    }
}
